"""What a run leaves on the disk: every file of the run folder, and when a folder is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    END,
    VOCABULARY,
    first_token,
    letters_tokenizer,
    offline_groups,
    prompts,
    rows_of,
    run,
    settings,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo.errors import UserError
from gvpo.group_files import read_groups
from gvpo.training.config import GVPOConfig, load_config
from gvpo.training.loop import GVPOTrainer
from gvpo.training.run_folder import RunFolder, checkpoints, disk, new_folder, replace_text

FILES = {"config.yaml", "metrics.jsonl", "timings.jsonl", "completions", "model", "summary.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[GVPOTrainer, Path]:
    """A run of 3 updates in 2 rollouts, over text, with evaluations."""
    folder = tmp_path_factory.mktemp("run") / "deep" / "folder"
    rows = [{"prompt": letter * 2, "answer": letter} for letter in "abcdef"]

    def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        return [text.count(letter) / 4 for text, letter in zip(completions, answer, strict=True)]

    options = {"output_dir": str(folder), "max_steps": 3, "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3}
    trainer = run(tiny_model(), rows, reward, tokenizer=letters_tokenizer(), eval_dataset=rows[:2], **options)
    return trainer, folder


def test_the_files(finished: tuple[GVPOTrainer, Path]) -> None:
    _, folder = finished
    assert {entry.name for entry in folder.iterdir()} == FILES | {"checkpoints"}
    assert [entry.name for entry in (folder / "checkpoints").iterdir()] == ["step-2"]


def test_metrics_have_a_row_an_update_and_no_timings(finished: tuple[GVPOTrainer, Path]) -> None:
    trainer, folder = finished
    rows = rows_of(folder / "metrics.jsonl")
    assert rows == trainer.history
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all("seconds" not in name and "time" not in name for row in rows for name in row)


def test_timings_stand_apart(finished: tuple[GVPOTrainer, Path]) -> None:
    rows = rows_of(finished[1] / "timings.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert {f"seconds/{name}" for name in ("rollout", "reward", "reference", "update")} <= rows[0].keys()
    assert "seconds/rollout" not in rows[1] and "seconds/evaluation" in rows[1]
    assert all(value >= 0 for row in rows for value in row.values())


def test_completions_are_groups_with_their_rewards(finished: tuple[GVPOTrainer, Path]) -> None:
    trainer, folder = finished
    files = sorted((folder / "completions").iterdir())
    assert [file.name for file in files] == [
        "eval-000002.jsonl",
        "eval-000003.jsonl",
        "rollout-000001.jsonl",
        "rollout-000002.jsonl",
    ]
    for file in files[2:]:
        groups = list(read_groups(file))
        assert len(groups) == 4
        for group in groups:
            assert group.k == 3 and isinstance(group.prompt, str) and group.columns == {"answer": group.prompt[0]}
            for completion in group.completions:
                assert completion.text is not None and completion.source == "policy"
                assert completion.reward == completion.text.count(group.prompt[0]) / 4
                assert completion.meta.keys() == {"update", "rewards"}
                assert completion.meta["rewards"] == {"reward": completion.reward}
    answers = [reward for group in read_groups(files[1]) for reward in group.rewards if reward is not None]
    assert len(answers) == 2 and trainer.history[-1]["eval/reward"] == sum(answers) / 2


def test_the_model_loads_elsewhere_with_the_same_logits(finished: tuple[GVPOTrainer, Path]) -> None:
    trainer, folder = finished
    again = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[1, 2, 3, END]])
    assert torch.equal(again(ids).logits, trainer.model(ids).logits)
    assert list((folder / "model").glob("*.safetensors")) and not list((folder / "model").glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.encode("abc") == [0, 1, 2] and tokenizer.eos_token_id == END
    card = (folder / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "2504.19599" in card and "| `beta` | `0.1` |" in card


def test_the_config_reloads(finished: tuple[GVPOTrainer, Path]) -> None:
    trainer, folder = finished
    assert GVPOConfig(**load_config(folder / "config.yaml")) == trainer.config


def test_the_summary(finished: tuple[GVPOTrainer, Path]) -> None:
    trainer, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    last = trainer.history[-1]
    assert summary["updates"] == 3 and summary["seed"] == 42 and summary["seconds"] > 0
    assert [summary[name] for name in ("reward", "loss", "eval/reward")] == [
        last[name] for name in ("reward", "loss", "eval/reward")
    ]


def test_train_returns_the_summary(tmp_path: Path) -> None:
    trainer = GVPOTrainer(tiny_model(), offline_groups(), config=settings(output_dir=str(tmp_path)))
    assert trainer.train() == json.loads((tmp_path / "summary.json").read_text())


def test_without_a_tokenizer_tables_hold_ids_and_model_has_none(tmp_path: Path) -> None:
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path), max_steps=1)
    group = next(read_groups(tmp_path / "completions" / "rollout-000001.jsonl"))
    assert group.prompt is None and group.prompt_ids is not None
    for completion in group.completions:
        assert completion.text is None and completion.token_ids is not None
        assert completion.reward == completion.token_ids[0] / VOCABULARY
    assert not list((tmp_path / "model").glob("tokenizer*"))


def test_the_models_folder_trains_on(tmp_path: Path) -> None:
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path / "one"))
    trainer = run(str(tmp_path / "one" / "model"), prompts(), first_token, max_steps=1)
    assert len(trainer.history) == 1


def test_save_model_anywhere(tmp_path: Path) -> None:
    trainer = run(tiny_model(), prompts(), first_token)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "run_name": "mine", "logging_steps": 2, "max_steps": 4}
    trainer = run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path / "run"), **options)
    (file,) = (tmp_path / "run" / "mine").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({row["update"]: row["loss"] for row in trainer.history[1::2]}, rel=1e-6)


def test_no_output_dir_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = run(tiny_model(), prompts(), first_token, save_steps=1, eval_dataset=prompts(2))
    assert not any(tmp_path.iterdir()) and len(trainer.history) == 4


# Folders that are refused, and those that are not


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    run(tiny_model(), offline_groups(), output_dir=str(tmp_path), max_steps=1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="already holds a run") as caught:
        run(tiny_model(), offline_groups(), output_dir=str(tmp_path), max_steps=2)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_empty_folder_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    run(tiny_model(), offline_groups(), output_dir=str(folder), max_steps=1)
    assert {entry.name for entry in folder.iterdir()} == FILES


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is not a folder"):
        run(tiny_model(), offline_groups(), output_dir=str(file))
    with pytest.raises(UserError, match="file is not a folder"):
        run(tiny_model(), offline_groups(), output_dir=str(file / "run"))
    assert file.read_text() == "mine"


def test_a_run_that_failed_before_its_first_rewards_is_in_nobodys_way(tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    with pytest.raises(UserError, match="returned 1 values"):
        run(tiny_model(), prompts(), lambda completion_ids, **_: [0.0], **options)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.yaml"]
    run(tiny_model(), prompts(), first_token, **options)
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny_model(), prompts(), first_token, **options)


# Files that are whole or not there


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_full_and_closed_disks_in_one_line(error: OSError, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught, disk(tmp_path / "metrics.jsonl"):
        raise error
    assert "\n" not in str(caught.value) and "metrics.jsonl" in str(caught.value)


def test_other_errors_are_bugs() -> None:
    with pytest.raises(ZeroDivisionError), disk(Path("x")):
        raise ZeroDivisionError


def test_a_full_disk_while_a_row_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="no space left"):
        run(tiny_model(), offline_groups(), output_dir=str(tmp_path / "run"))


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
    (tmp_path / ".new.tmp").mkdir()  # what a killed process leaves behind
    with new_folder(target) as folder:
        (folder / "other").write_text("newer")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["new", "other"]


def test_replace_text_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    replace_text(file, "one")
    replace_text(file, "two")
    assert file.read_text() == "two" and list(tmp_path.iterdir()) == [file]

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gvpo.training.run_folder.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(file, "three")
    assert file.read_text() == "two" and list(tmp_path.iterdir()) == [file]


def test_rows_are_cut_back_to_an_update(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("metrics.jsonl", "timings.jsonl"):
        for update in range(4):
            folder.append(name, {"update": update, "value": 0.1 * update})
    whole = (tmp_path / "timings.jsonl").read_text().splitlines(keepends=True)
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"update": 4, "va')  # a crash in the middle of a line
    history = [{"update": n, "value": 0.1 * n} for n in range(3)]
    folder.cut_back(2, 1, history)
    assert rows_of(tmp_path / "metrics.jsonl") == history
    assert (tmp_path / "timings.jsonl").read_text() == "".join(whole[:3])


def test_policies_of_later_updates_go_too(tmp_path: Path) -> None:
    for name in ("update-000002", "update-000003", "update-mine"):
        (tmp_path / "policy" / name).mkdir(parents=True)
    RunFolder(tmp_path, resume=True).cut_back(2, 1, [])
    assert sorted(folder.name for folder in (tmp_path / "policy").iterdir()) == ["update-000002", "update-mine"]


def test_a_file_that_holds_no_rows_is_refused_before_anything_goes(tmp_path: Path) -> None:
    (tmp_path / "timings.jsonl").write_text("mine\n")
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"timings\.jsonl: not the rows of a run"):
        RunFolder(tmp_path, resume=True).cut_back(2, 1, [{"update": 2}])
    assert {file.name for file in tmp_path.iterdir()} == {"timings.jsonl", "checkpoints"}
    assert checkpoints(tmp_path)


def test_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    for name in ("step-10", "step-9", ".step-11.tmp", "step-x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [entry.name for entry in checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert checkpoints(None) == checkpoints(tmp_path / "none") == []
