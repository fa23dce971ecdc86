"""`gvpo export-verl`: a folder that verl runs from; verl is not needed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from training_helpers import CHAT_TEMPLATE, letters_tokenizer, tiny_model

from gvpo.cli.main import main
from gvpo.errors import UserError
from gvpo.integrations.verl_runs.reward import compute_score


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a reward, three chat rows and a config."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    letters_tokenizer(CHAT_TEMPLATE).save_pretrained("tiny")
    Path("judges.py").write_text(
        "def count(completions, want, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [None if w is None else float(t.count(w)) for t, w in zip(texts, want)]\n"
    )
    write_rows([{"prompt": [{"role": "user", "content": text}], "want": text[0]} for text in ("abc", "bcde", "c")])
    Path("config.yaml").write_text(
        "model: tiny\ntrain_dataset: rows.jsonl\nreward_funcs: judges:count\nmax_completion_length: 6\n"
        "groups_per_update: 2\nmax_steps: 4\n"
    )
    return tmp_path


def write_rows(rows: list[dict]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def export(*flags: str) -> int | None:
    return main(["export-verl", "config.yaml", *flags])


def arguments(tmp_path: Path) -> dict[str, str]:
    """What the script hands to verl, by a stand-in for python3."""
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin"}
    script = tmp_path / "verl-run" / "run.sh"
    done = subprocess.run([script, "trainer.nnodes=3"], env=environment, capture_output=True, text=True, check=True)
    path, *lines = done.stdout.splitlines()
    assert path == str(tmp_path)
    assert lines[:2] == ["-m", "verl.trainer.main_ppo"]
    assert lines[-1] == "trainer.nnodes=3"
    return {name: value.strip("'") for name, value in (line.split("=", 1) for line in lines[2:])}


def test_the_script_has_the_run_and_the_data_its_rows(folder: Path) -> None:
    assert export("--gpus", "2", "--learning_rate", "3e-5") is None

    found = arguments(folder)
    assert found["actor_rollout_ref.actor.optim.lr"] == "3e-05"
    assert found["trainer.n_gpus_per_node"] == "2"
    assert found["actor_rollout_ref.model.path"] == str(folder / "tiny")
    assert found["data.train_files"] == str(folder / "verl-run" / "train.parquet")
    # The longest prompt, "bcde", and the template's "~".
    assert found["data.max_prompt_length"] == "5"
    assert "actor_rollout_ref.model.custom_chat_template" not in found
    rows = pq.read_table(folder / "verl-run" / "train.parquet").to_pylist()
    # A rollout has 4 prompts, and the file 3: it is there twice.
    assert [row["prompt"][0]["content"] for row in rows] == ["abc", "bcde", "c"] * 2
    scores = [
        compute_score("gvpo", "bb a", "", row["extra_info"], reward_funcs=["judges:count"], reward_weights=[10.0])
        for row in rows[:3]
    ]
    assert scores == [10.0, 20.0, 0.0]


def test_no_opinion_is_no_number(folder: Path) -> None:
    """verl leaves out of its group what its reward function raises at; a zero would teach."""
    row = json.dumps({"prompt": "a", "columns": {"want": None}})
    with pytest.raises(ValueError, match="has an opinion"):
        compute_score("gvpo", "a", "", {"gvpo_row": row}, reward_funcs=["judges:count"])


def test_string_prompts_get_a_template_that_is_their_text(folder: Path) -> None:
    write_rows([{"prompt": "abc", "want": "a"}])
    assert export() is None
    found = arguments(folder)
    assert found["actor_rollout_ref.model.custom_chat_template"].count("message['content']".replace("'", "\\'")) == 1
    assert found["data.max_prompt_length"] == "3"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completions": ["b", "c"], "rewards": [0, 1], "want": "a"}], "brings its own completions"),
        ([{"prompt_ids": [1], "want": "a"}], "has prompt_ids alone"),
        ([{"prompt": "a", "want": "a"}, {"prompt": [{"role": "user", "content": "b"}], "want": "b"}], "one kind"),
        (
            [{"prompt": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "want": "b"}],
            "assistant's turn",
        ),
        ([{"prompt": [{"role": "user", "content": "b", "name": "c"}], "want": "b"}], "more than role and content"),
    ],
)
def test_rows_that_verl_cannot_take_are_named(rows: list[dict], message: str, capsys: pytest.CaptureFixture) -> None:
    write_rows(rows)
    assert export() == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_what_is_refused_late_leaves_nothing_behind(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Two kinds of prompts: known when the tokenizer is there."""
    before = sorted(folder.iterdir())
    write_rows([{"prompt": "a", "want": "a"}, {"prompt": [{"role": "user", "content": "b"}], "want": "b"}])
    assert export("--out", "other") == 2
    assert sorted(folder.iterdir()) == before


def test_what_was_kept_for_this_machine_is_not_asked_of_it(folder: Path) -> None:
    """Neither vLLM nor trackers need be installed here; a name that is not verl's is refused."""
    assert export("--use_vllm", "true", "--report_to", "swanlab") is None
    found = arguments(folder)
    assert found["trainer.logger"] == "[console, swanlab]"
    assert export("--out", "b", "--report_to", "all") == 2


@pytest.mark.parametrize("out", ["rows.jsonl/sub", "/proc/none/sub"])
def test_a_folder_that_cannot_be_written_is_named(out: str, capsys: pytest.CaptureFixture) -> None:
    assert export("--out", out) == 2
    assert f"--out {out}: " in capsys.readouterr().err


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture) -> None:
    Path("verl-run").mkdir()
    Path("verl-run/mine").touch()
    assert export() == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_what_verl_cannot_do_is_refused_before_anything_is_written(capsys: pytest.CaptureFixture) -> None:
    assert export("--objective", "grpo") == 2
    assert "objective is 'grpo'" in capsys.readouterr().err
    assert not Path("verl-run").exists()
    with pytest.raises(UserError):
        compute_score("gvpo", "a", "", {"gvpo_row": '{"prompt": "a", "columns": {}}'}, reward_funcs=["judges:none"])
