"""Killed anywhere, a run goes on as if nothing had been; what is half made or half deleted is taken for nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_worker
import pytest
from interruptions import POINTS, differences, strike, trainer_in
from training_helpers import first_token, prompts, run, tiny_model

from gvpo.errors import UserError
from gvpo.training import run_folder
from gvpo.training.run_folder import RunFolder, checkpoints, leftovers, remove_folder

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands in for a kill: what it leaves behind is what a handler of exceptions leaves, or more."""


def die() -> None:
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_in(folder, save_steps=2, save_total_limit=2).train()
    return folder


@pytest.mark.parametrize(
    ("point", "call", "left"),
    [
        ("sampling", 14, ["step-2"]),
        ("reward", 19, ["step-2"]),
        ("reference", 3, ["step-2"]),
        ("backward", 5, ["step-2", "step-4"]),
        ("after the step", 4, ["step-2"]),
        ("evaluation", 3, ["step-2"]),
        ("rows", 9, ["step-2"]),  # between the rows of metrics and timings of update 4
        ("rows", 10, ["step-2"]),
        ("checkpoint", 7, ["step-2"]),
        ("its state", 2, ["step-2"]),
        ("pruning", 1, ["step-2", "step-4", "step-6"]),
    ],
)
def test_an_interrupted_run_goes_on(point: str, call: int, left: list[str], tmp_path: Path, whole: Path) -> None:
    options = {"save_steps": 2, "save_total_limit": 2}
    trainer = trainer_in(tmp_path, **options)
    undo = strike(POINTS[point](trainer), call, die)
    with pytest.raises(Killed):
        trainer.train()
    undo()
    assert [folder.name for folder in checkpoints(tmp_path)] == left
    again = trainer_in(tmp_path, seed=5, **options)
    again.train(resume_from_checkpoint=True)
    assert differences(tmp_path, whole) == []


def test_killed_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, str(HERE / "killed_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told.keys() == killed_worker.KILLS.keys()
    for name, one in told.items():
        assert (name, one["status"]) == (name, signal.SIGKILL)
        assert (name, one["checkpoints"]) == (name, ["step-4"] if name == "pruning" else ["step-2"])
        assert (name, one["hidden at the end"]) == (name, [])
        assert (name, differences(tmp_path / name, tmp_path / "whole")) == (name, [])
    assert told["checkpoint"]["hidden"] == told["its state"]["hidden"] == [".step-4.tmp"]
    assert told["pruning"]["hidden"] == [".step-2.old"]
    assert told["completions"]["hidden"] == []


def test_a_full_disk_while_a_source_is_saved(tmp_path: Path) -> None:
    class Full:
        def save(self, folder: Path) -> None:
            (folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        def load(self, folder: Path) -> None: ...

    trainer = trainer_in(tmp_path, save_steps=2)
    trainer.state.sources = {"full": Full()}
    with pytest.raises(UserError, match="no space left"):
        trainer.train()
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Deleting


def test_a_removal_that_is_interrupted_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")

    def stopped(path: Path, *args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", stopped)
        with pytest.raises(Killed):
            remove_folder(folder)
    assert checkpoints(tmp_path) == [] and [entry.name for entry in leftovers(tmp_path)] == [".step-2.old"]
    folder.mkdir()
    remove_folder(folder)  # over what the first left
    assert list(folder.parent.iterdir()) == []


def test_going_back_deletes_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path), max_steps=4, save_steps=1)
    completions = sorted(file.name for file in (tmp_path / "completions").iterdir())
    real, gone = shutil.rmtree, []

    def once(path: Path, *args: Any, **kwargs: Any) -> None:
        if gone:
            raise Killed
        gone.append(path)
        real(path, *args, **kwargs)

    monkeypatch.setattr(run_folder.shutil, "rmtree", once)
    with pytest.raises(Killed):
        RunFolder(tmp_path, resume=True).cut_back(1, 1, [{"update": 1}])
    # What is left of the branch is whole: each checkpoint with the completions up to it.
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-1", "step-2"]
    assert sorted(file.name for file in (tmp_path / "completions").iterdir()) == completions


def test_hidden_leftovers_go_when_a_run_goes_on_and_nothing_else(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    unfinished = [".model.tmp", ".model.old", ".metrics.jsonl.tmp", ".config.yaml.tmp", ".summary.json.tmp"]
    unfinished += [
        "checkpoints/.step-7.tmp",
        "checkpoints/.step-1.old",
        "completions/.rollout-000004.jsonl.0a1b2c3d.tmp",
    ]
    unfinished += ["policy/.update-000003.tmp", "completions/.eval-000004.jsonl.0a1b2c3d.tmp"]
    mine = [".mine.tmp", "completions/.mine.jsonl.tmp", "checkpoints/.step-1.kept", ".gitignore", "policy/.mine.old"]
    for name in (*unfinished, *mine):
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(("tmp", "old")) and ".jsonl" not in name and ".json" not in name and ".yaml" not in name:
            (folder / name / "deep").mkdir(parents=True)
        else:
            (folder / name).write_text("half")
    trainer_in(folder, seed=5, save_steps=2, save_total_limit=2).train(resume_from_checkpoint=True)
    assert [name for name in unfinished if (folder / name).exists()] == []
    assert [name for name in mine if not (folder / name).exists()] == []


def test_a_run_that_died_while_it_wrote_its_config_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.tmp").write_text("half")
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path), max_steps=1)
