"""`gvpo sample`: what it draws, and that stopping, killing and sharing lose nothing and draw nothing twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import END, letters_tokenizer, rows_of, tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from gvpo import group_files
from gvpo.cli.main import main
from gvpo.group_files import locked_file, read_groups
from gvpo.models.loading import load_model
from gvpo.sampling import group_writer, published
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler
from gvpo.sources.dataset import PromptOrder, read_rows
from gvpo.sources.policy import draw_seed

PROMPTS = ["a", "bc", "d e", "fgh", "ij", "k"]
SETTINGS = ["--model", "tiny", "--prompts", "rows.jsonl", "-k", "3", "--max_completion_length", "5", "--batch", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two models and rows to draw for."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(["tiny", "other"]):
        tiny_model(seed).save_pretrained(folder / name)
        letters_tokenizer().save_pretrained(folder / name)
    rows = [json.dumps({"prompt": prompt, "answer": prompt.upper()}) + "\n" for prompt in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(rows))
    disable_progress_bar()  # set up before the command could: its bars would be in the way of what is on stderr
    yield folder
    enable_progress_bar()


@pytest.fixture(autouse=True)
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: empty but for links to the models and rows."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(out: str, *more: str) -> int:
    return main(["sample", *SETTINGS, "--out", out, *more]) or 0


def files(folder: str) -> dict[str, bytes]:
    """What a reader of the folder sees."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*") if path.is_file()}


def ids(path: str) -> list[str | None]:
    return [group.id for group in read_groups(path)]


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, act: Callable[[], None]) -> None:
    """Have `act` done when so many batches are about to be written, or on their way."""
    for name in ("append_groups", "write_groups"):
        write, seen = getattr(group_writer, name), []

        def writing(groups: Any, path: Any, write: Any = write, seen: Any = seen) -> int:
            if len(groups):
                seen.append(path)
                if len(seen) == batches:
                    act()
            return write(groups, path)

        monkeypatch.setattr(group_writer, name, writing)


class TestGroups:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_group_is_all_that_a_draw_is(self, dtype: str) -> None:
        how = ["--temperature", "0.7", "--top_p", "0.9", "--top_k", "9", "--seed", "5", "--rollout_dtype", dtype]
        # Many, for a rounding to show.
        assert sample("groups.jsonl", "-k", "99", *how) == 0
        groups = list(read_groups("groups.jsonl"))
        model, tokenizer = load_model("tiny")
        assert tokenizer is not None
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        params = SamplingParams(5, temperature=0.7, top_p=0.9, top_k=9)
        seeds = [draw_seed(5, position) for position in range(6)]
        drawn = TorchSampler(model, {END}, dtype=getattr(torch, dtype)).sample(prompts, 99, params, seeds=seeds)
        assert [group.prompt for group in groups] == PROMPTS
        assert [group.prompt_ids for group in groups] == prompts
        assert [group.columns for group in groups] == [{"answer": prompt.upper()} for prompt in PROMPTS]
        members = [member for group in groups for member in group.completions]
        assert [[one.token_ids for one in group.completions] for group in groups] == [
            [one.token_ids for one in group] for group in drawn
        ]
        assert [one.truncated for one in members] == [one.truncated for group in drawn for one in group]
        assert all(one.text == tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in members)
        assert all(one.source == "policy" and one.reward is None for one in members)
        assert all(one.meta == {"model": "tiny", "temperature": 0.7} for one in members)

    def test_ids_tell_every_draw_from_every_other(self) -> None:
        different = [
            ["--model", "other", "--source", "teacher"],
            ["--seed", "1"],
            ["--temperature", "0.5"],
            ["--top_p", "0.5"],
            ["--top_k", "2"],
            ["-k", "2"],
            ["--max_completion_length", "4"],
            ["--epochs", "2", "--limit", "3", "--seed", "2"],
        ]
        for more in [[], *different]:
            assert sample("groups.jsonl", *more) == 0
        groups = list(read_groups("groups.jsonl"))
        names = [group.id or "" for group in groups]
        assert len(set(names)) == len(names) == 9 * len(PROMPTS)
        assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in names)
        assert {one.source for one in groups[len(PROMPTS)].completions} == {"teacher"}
        assert groups[-1].prompt == groups[-4].prompt and groups[-1].completions != groups[-4].completions

    def test_other_prompts_in_their_place_are_drawn_for(self) -> None:
        Path("ids.jsonl").write_text('{"prompt_ids": [1, 2]}\n')
        Path("more.jsonl").write_text('{"prompt_ids": [2, 1]}\n')
        for prompts in ("rows.jsonl", "ids.jsonl", "more.jsonl"):
            assert sample("groups.jsonl", "--prompts", prompts, "--limit", "1") == 0
        assert [group.prompt_ids for group in read_groups("groups.jsonl")] == [[0], [1, 2], [2, 1]]

    def test_rows_come_in_order_or_shuffled_anew_in_every_pass(self) -> None:
        assert sample("groups.jsonl", "--epochs", "2", "--shuffle", "--limit", "5") == 0
        order = PromptOrder(read_rows("rows.jsonl")[:5], 42, shuffle=True).take(0, 10)
        assert [group.prompt for group in read_groups("groups.jsonl")] == [row.prompt for row in order]
        assert [row.prompt for row in order[:5]] != [row.prompt for row in order[5:]]

    def test_rows_of_token_ids_need_no_tokenizer(self) -> None:
        tiny_model().save_pretrained("bare")
        Path("ids.jsonl").write_text('{"prompt_ids": [1, 2], "target": 3}\n')
        assert sample("groups.jsonl", "--model", "bare", "--prompts", "ids.jsonl") == 0
        [group] = read_groups("groups.jsonl")
        assert (group.prompt, group.prompt_ids, group.columns) == (None, [1, 2], {"target": 3})
        assert [one.text for one in group.completions] == [None] * 3


class TestGoingOn:
    @pytest.mark.parametrize("kept", [1, 2, 5])  # of batches of two
    def test_a_file_that_was_cut_goes_on_to_the_same_bytes(self, kept: int) -> None:
        assert sample("whole.jsonl") == sample("cut.jsonl") == 0
        lines = Path("cut.jsonl").read_bytes().splitlines(keepends=True)
        Path("cut.jsonl").write_bytes(b"".join(lines[:kept]))
        assert sample("cut.jsonl") == 0
        assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()

    def test_a_batch_that_was_begun_is_drawn_as_a_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What shares a decode batch may move a rounding, and so a draw."""
        assert sample("groups.jsonl", "--limit", "3") == 0
        seen: list[int] = []
        draw = TorchSampler.sample_one_by_one
        monkeypatch.setattr(
            TorchSampler,
            "sample_one_by_one",
            lambda self, prompts, *a, **k: seen.append(len(prompts)) or draw(self, prompts, *a, **k),
        )
        assert sample("groups.jsonl") == 0
        assert seen == [2, 2] and len(ids("groups.jsonl")) == 6

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    @pytest.mark.parametrize("out", ["groups.jsonl", "folder/"])
    def test_a_signal_ends_it_after_the_batch(
        self, out: str, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        assert sample(f"whole-{out}") == 0
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
        with monkeypatch.context() as patch:
            stop_after(patch, 2, lambda: os.kill(os.getpid(), number))
            assert sample(out) == code
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert f"{out}: 4 groups drawn, 12 completions of" in capsys.readouterr().out
        paths = sorted(Path(out).iterdir()) if out.endswith("/") else [Path(out)]
        assert sum(len(rows_of(path)) for path in paths) == 4
        assert sample(out) == 0
        if out.endswith("/"):
            assert files(out) == files(f"whole-{out}")
        else:
            assert Path(out).read_bytes() == Path(f"whole-{out}").read_bytes()

    @pytest.mark.parametrize("out", ["groups.jsonl", "folder/"])
    def test_what_is_complete_says_so_and_loads_no_weights(
        self, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(out) == 0
        monkeypatch.setattr("gvpo.models.loading.load_model", None)
        capsys.readouterr()
        assert sample(out) == 0
        assert capsys.readouterr().out == f"all 6 groups are in {out}; another --seed draws more\n"

    def test_scored_groups_are_not_drawn_again(self) -> None:
        assert sample("groups.jsonl", "--limit", "4") == 0
        assert main(["score", "--reward", "exact_match", "groups.jsonl"]) in (None, 0)
        assert sample("groups.jsonl") == 0
        assert [group.rewards == [None] * 3 for group in read_groups("groups.jsonl")] == [False] * 4 + [True] * 2


class TestFolder:
    def test_each_batch_is_a_file_and_samplers_keep_apart(self) -> None:
        assert sample("new/folder/") == sample("new/folder", "--seed", "1") == 0
        names = sorted(files("new/folder"))
        samplers = sorted({name.split("-")[0] for name in names})
        assert len(samplers) == 2
        assert names == [f"{sampler}-{n:06d}.jsonl" for sampler in samplers for n in (1, 2, 3)]
        assert [len(rows_of(Path("new/folder") / name)) for name in names] == [2] * 6

    def test_it_goes_on_with_the_first_number_that_is_missing(self) -> None:
        assert sample("folder/") == 0
        before = files("folder")
        first, second, third = sorted(before)
        kept = {name: (Path("folder") / name).stat().st_mtime_ns for name in (first, third)}
        (Path("folder") / second).unlink()
        assert sample("folder/") == 0
        assert files("folder") == before
        assert {name: (Path("folder") / name).stat().st_mtime_ns for name in kept} == kept

    def test_more_rows_or_another_batch_draw_only_what_is_missing(self) -> None:
        assert sample("folder/", "--limit", "3") == 0
        before = files("folder")
        assert sample("folder/", "--batch", "5") == 0
        after = files("folder")
        assert before.items() <= after.items()
        names = [json.loads(line)["id"] for name in sorted(after) for line in after[name].splitlines()]
        assert sample("groups.jsonl") == 0
        assert names == ids("groups.jsonl")

    def test_a_sampler_removes_what_its_own_kill_left_only(self) -> None:
        assert sample("folder/") == 0
        [*_, name] = sorted(files("folder"))
        own = Path("folder") / f".{name.split('-')[0]}-000004.jsonl.00ff.tmp"
        foreign = Path("folder") / ".0123abcd-000001.jsonl.00ff.tmp"
        for path in (own, foreign):
            path.write_text("half")
        assert sample("folder/") == 0
        assert (own.exists(), foreign.exists()) == (False, True)

    def test_killed_and_started_again_it_fills_the_folder_of_an_undisturbed_one(self, here: Path) -> None:
        """Killed with the second file written, and not yet under its name."""
        code = (
            "import os, signal, sys\n"
            "from gvpo import group_files\n"
            "from gvpo.cli.main import main\n"
            "renames, replace = [], os.replace\n"
            "def last(*paths):\n"
            "    renames.append(paths)\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if len(renames) == 2 else replace(*paths)\n"
            "group_files.os.replace = last\n"
            "main(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", code, "sample", *SETTINGS, "--out", "folder/"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(files("folder")) == 1
        assert any(path.name.endswith(".tmp") for path in Path("folder").iterdir())
        assert sample("folder/") == sample("whole/") == 0
        assert files("folder") == files("whole")
        assert {path.name for path in Path("folder").iterdir()} == set(files("folder"))


def test_two_samplers_and_a_scorer_share_a_file() -> None:
    """All of each sampler's groups, in its order, none lost, none twice, while the file is replaced again and again."""
    path, entry = Path("groups.jsonl"), "import sys; from gvpo.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", entry, "sample", *SETTINGS, "--out", str(path), "--batch", "1", "--epochs", "0"]
    workers = [subprocess.Popen([*command, "--temperature", heat]) for heat in ("0.5", "1.0")]
    scored, both = 0, False
    while scored < 4 or not both:
        assert [worker.poll() for worker in workers] == [None, None]
        if path.exists() and path.stat().st_size:
            assert main(["score", "--reward", "exact_match", str(path)]) in (None, 0)
            both = len(_by_temperature(path)) == 2
            scored += both
        time.sleep(0.1)
    for worker in workers:
        worker.terminate()
    assert [worker.wait() for worker in workers] == [143, 143]
    for prompts in _by_temperature(path).values():
        assert prompts == [PROMPTS[n % len(PROMPTS)] for n in range(len(prompts))]
    assert len(set(ids(str(path)))) == len(ids(str(path)))
    assert None not in next(read_groups(path)).rewards


def _by_temperature(path: Path) -> dict[float, list[Any]]:
    """The prompts that each of the samplers has drawn for, in the order of the file."""
    prompts: dict[float, list[Any]] = {}
    for group in read_groups(path):
        prompts.setdefault(group.completions[0].meta["temperature"], []).append(group.prompt)
    return prompts


class TestPublishedPolicy:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gvpo.cli.sample.POLL_SECONDS", 0.0)

    def publish(self, update: int, model: str = "tiny") -> None:
        shutil.copytree(model, f"run/policy/update-{update:06d}")

    def updates(self, path: str = "groups.jsonl") -> list[int]:
        return [one.meta["update"] for group in read_groups(path) for one in group.completions[:1]]

    def test_the_newest_draws(self) -> None:
        for update, model in ((9, "other"), (120, "tiny"), (11, "other")):
            self.publish(update, model)
        Path("run/policy/.update-000200.tmp").mkdir()
        assert sample("groups.jsonl", "--model", "run/policy/") == sample("plain.jsonl") == 0
        drawn, plain = (list(read_groups(path)) for path in ("groups.jsonl", "plain.jsonl"))
        assert self.updates() == [120] * 6
        assert {one.meta["model"] for one in drawn[0].completions} == {"run/policy"}
        texts = [[[one.text for one in group.completions] for group in groups] for groups in (drawn, plain)]
        assert texts[0] == texts[1]

    def test_following_it_takes_each_newer_one_before_a_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.publish(1)
        stop_after(monkeypatch, 2, lambda: self.publish(2, "other"))
        loaded: list[str] = []
        monkeypatch.setattr(published, "load_model", lambda path, **options: loaded.append(path) or load_model(path))
        assert sample("groups.jsonl", "--model", "run/policy", "--follow") == 0
        assert self.updates() == [1, 1, 1, 1, 2, 2]
        assert loaded == ["run/policy/update-000001", "run/policy/update-000002"]
        assert sample("other.jsonl", "--model", "other") == 0
        drawn, other = (list(read_groups(path))[4:] for path in ("groups.jsonl", "other.jsonl"))
        assert [[one.text for one in a.completions] for a in drawn] == [
            [one.text for one in b.completions] for b in other
        ]

    def test_not_following_it_stays_with_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.publish(1)
        stop_after(monkeypatch, 1, lambda: self.publish(2, "other"))
        assert sample("groups.jsonl", "--model", "run/policy") == 0
        assert self.updates() == [1] * 6

    def test_ids_do_not_hold_the_update(self) -> None:
        self.publish(1)
        assert sample("groups.jsonl", "--model", "run/policy", "--limit", "2") == 0
        self.publish(2, "other")
        assert sample("groups.jsonl", "--model", "run/policy") == 0
        assert self.updates() == [1, 1, 2, 2, 2, 2]

    @pytest.mark.parametrize("there", [False, True])
    def test_it_waits_for_the_first_and_says_so_once(
        self, there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if there:
            Path("run/policy").mkdir(parents=True)
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                self.publish(7)

        monkeypatch.setattr("gvpo.cli.sample.time.sleep", sleep)
        assert sample("groups.jsonl", "--model", "run/policy", "--follow") == 0
        assert (len(slept), self.updates()) == (3, [7] * 6)
        assert capsys.readouterr().err == "gvpo sample: waiting for run/policy/update-*\n"

    def test_it_can_be_stopped_while_it_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gvpo.cli.sample.time.sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert sample("groups.jsonl", "--model", "run/policy", "--follow") == 143
        assert not Path("groups.jsonl").exists()

    @pytest.mark.parametrize("removed", ["", "config.json", "model.safetensors", "tokenizer.json"])
    def test_one_that_is_removed_while_it_is_read_makes_way_for_the_newest(
        self, removed: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.publish(1, "other")
        load, old = load_model, Path("run/policy/update-000001")

        def loading(path: str, **options: Any) -> Any:
            if not Path("run/policy/update-000002").exists():
                self.publish(2)
                (old / removed).unlink() if removed else shutil.rmtree(old)
                if removed == "tokenizer.json":
                    (old / "tokenizer_config.json").unlink()
            return load(path, **options)

        monkeypatch.setattr(published, "load_model", loading)
        assert sample("groups.jsonl", "--model", "run/policy") == 0
        assert self.updates() == [2] * 6
        assert all(one.text is not None for group in read_groups("groups.jsonl") for one in group.completions)

    def test_a_broken_one_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.publish(1)
        Path("run/policy/update-000001/model.safetensors").write_bytes(b"broken")
        assert sample("groups.jsonl", "--model", "run/policy") == 2
        assert "model 'run/policy/update-000001': cannot be loaded" in capsys.readouterr().err


class TestMistakes:
    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (["-k", "1"], "-k 1: a group of one teaches nothing; give 2 or more"),
            (["--temperature", "0"], "--temperature: input should be greater than 0, got 0.0"),
            (["--top_p", "1.5"], "--top_p: input should be less than or equal to 1, got 1.5"),
            (["--rollout_dtype", "half"], "--rollout_dtype: input should be 'auto', 'float32' or 'bfloat16'"),
            (["--source", ""], "--source: empty; name where the completions come from"),
            (["--prompts", "no.jsonl"], "no.jsonl: no such file; check the path"),
            (["--prompts", "offline.jsonl"], "offline.jsonl, line 1: brings its own completions, so there is nothing"),
            (["--prompt_column", "question"], "rows.jsonl, line 1, field 'question': missing"),
            (["--model", "./no"], "model './no': no such folder; "),
            (["--model", "empty"], "model 'empty': holds no update-* yet; --follow waits for the first"),
            (["--follow"], "--follow: model 'tiny' is not a folder of update-*; give OUTPUT_DIR/policy of a run"),
            (["--follow", "--model", "run"], "--follow: model 'run' is not a folder of update-*; give run/policy"),
            (["--follow", "--model", "no/such"], "--follow: model 'no/such' is not a folder of update-*; "),
            (["--out", "groups.parquet"], "groups.parquet: a Parquet file cannot grow group by group; name a .jsonl"),
            (["--out", "groups"], "groups: neither a .jsonl file nor a folder; end a folder that is to be made with a"),
            (["--out", "no/groups.jsonl"], "no/groups.jsonl: the folder no does not exist; make it first"),
            (["--out", "rows.jsonl"], "rows.jsonl, line 1: not a group, and groups are only appended to groups"),
            (["--out", "rows.jsonl/"], "rows.jsonl: is a file, not a folder; name it without the / at the end"),
            (["--out", "torn.jsonl"], "torn.jsonl: the last line has no line end, so it looks truncated"),
            (["--max_completion_length", "64"], "rows.jsonl, line 1, field 'prompt': 1 tokens and max_completion_"),
        ],
    )
    def test_each_is_one_line_and_leaves_all_as_it_was(
        self, more: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("offline.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"]}\n')
        Path("torn.jsonl").write_text('{"id": "a", "prom')
        Path("run/policy").mkdir(parents=True)
        Path("empty").mkdir()
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        assert sample("groups.jsonl", *more) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo sample: {line}")
        assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize("out", ["groups.jsonl", "folder/"])
    def test_the_same_sampler_is_not_started_twice(self, out: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert sample("named/", "--limit", "1") == 0
        name = next(iter(files("named"))).split("-")[0]
        lock = Path(f".{out}.{name}.lock")
        if out.endswith("/"):
            Path(out).mkdir()
            lock = Path(out) / f".{name}.lock"
        with locked_file(lock, "ab"):
            assert sample(out) == 2
            assert "a sampler with the same model and settings is drawing into it" in capsys.readouterr().err
            assert sample(out, "--seed", "1") == 0
        assert sample(out) == 0

    @pytest.mark.parametrize("out", ["groups.jsonl", "folder/"])
    def test_a_full_disk_leaves_what_was_there(
        self, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert sample(out, "--limit", "2") == 0
        before = files(".") if out == "groups.jsonl" else files("folder")

        def full(*arguments: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            for name in ("write", "fsync"):
                patch.setattr(group_files.os, name, full)
            assert sample(out) == 2
        err = capsys.readouterr().err
        assert "no space left on the disk" in err and err.count("\n") == 1
        assert (files(".") if out == "groups.jsonl" else files("folder")) == before
        assert sample(out) == 0
