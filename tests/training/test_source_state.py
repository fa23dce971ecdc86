"""What sources keep is part of a checkpoint: replay, positions in files, and a caller's own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from interruptions import POINTS, SOURCES, differences, strike, trainer_in
from training_helpers import offline_groups, same_weights, weights

from gvpo.errors import UserError
from gvpo.group_files import write_groups
from gvpo.groups import Completion
from gvpo.sources.dataset import Row
from gvpo.training.preemption import Stopped


class Counting:
    """Brings a completion that says how often it was asked; its state lies in two files, one of them deep."""

    def __init__(self) -> None:
        self.asked = 0

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        made = []
        for _ in rows:
            self.asked += 1
            made.append([Completion(None, [self.asked % 15, 15], source="counting")])
        return made

    def mark(self) -> Callable[[], None]:
        asked = self.asked
        return lambda: setattr(self, "asked", asked)

    def save(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "deep" / "deeper").mkdir(parents=True)
        (folder / "deep" / "deeper" / "count.json").write_text(json.dumps(self.asked))
        (folder / "note.txt").write_text("a note")

    def load(self, folder: Path) -> None:
        self.asked = json.loads((folder / "deep" / "deeper" / "count.json").read_text())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Groups in two files, to be taken up in passes."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        write_groups(offline_groups(3, seed), folder / f"{name}.jsonl")
    return folder


def mixture(files: Path) -> list[Any]:
    return [*SOURCES, {"type": "files", "path": str(files), "groups": 1, "uses": 9}, Counting()]


OPTIONS = {"groups_per_update": 3, "num_generations": 4, "save_steps": 3, "max_steps": 8, "token_budget": None}


@pytest.mark.parametrize(("point", "call"), [("backward", 6), ("reward", 30), ("checkpoint", 8)])
def test_sources_go_on_where_they_were(point: str, call: int, files: Path, tmp_path: Path) -> None:
    whole = trainer_in(tmp_path / "whole", sources=mixture(files), **OPTIONS)
    whole.train()
    assert {f"source/{name}" for name in ("policy", "replay", "dataset", "counting")} <= whole.history[-1].keys()

    def die() -> None:
        raise KeyboardInterrupt

    trainer = trainer_in(tmp_path / "parts", sources=mixture(files), **OPTIONS)
    undo = strike(POINTS[point](trainer), call, die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    undo()
    again = trainer_in(tmp_path / "parts", seed=5, sources=mixture(files), **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert differences(tmp_path / "parts", tmp_path / "whole") == []


@pytest.mark.parametrize(("point", "call"), [("sampling", 6), ("sampling", 14), ("reward", 30), ("reference", 3)])
def test_sources_are_put_back_when_a_rollout_is_given_up(point: str, call: int, files: Path, tmp_path: Path) -> None:
    trainer_in(tmp_path / "whole", sources=mixture(files), **OPTIONS).train()
    trainer = trainer_in(tmp_path / "parts", sources=mixture(files), **OPTIONS)
    undo = strike(POINTS[point](trainer), call, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trainer.train()
    undo()
    again = trainer_in(tmp_path / "parts", seed=5, sources=mixture(files), **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert differences(tmp_path / "parts", tmp_path / "whole") == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer_in(tmp_path / "run", sources=[*SOURCES, Counting()], save_steps=2, max_steps=2).train()
    return tmp_path / "run" / "checkpoints" / "step-2"


def refusal(saved: Path) -> str:
    trainer = trainer_in(None, sources=[*SOURCES, Counting()], max_steps=2)
    before = weights(trainer.model)
    with pytest.raises(UserError) as caught:
        trainer.train(resume_from_checkpoint=saved)
    assert same_weights(weights(trainer.model), before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_file_of_a_source_is_checked(saved: Path) -> None:
    files = [file for file in (saved / "sources").rglob("*") if file.is_file()]
    assert {file.relative_to(saved).as_posix() for file in files} == {
        "sources/replay/replay.sqlite",
        "sources/0-Counting/note.txt",
        "sources/0-Counting/deep/deeper/count.json",
    }
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        message = refusal(saved)
        assert str(file) in message and "damaged" in message
        file.unlink()
        assert str(file) in refusal(saved)
        file.write_bytes(data)
    trainer_in(None, sources=[*SOURCES, Counting()], max_steps=2).train(resume_from_checkpoint=saved)


def test_a_checkpoint_of_other_sources(saved: Path) -> None:
    with pytest.raises(UserError, match=r"sources was \[.*'Counting'\], is \["):
        trainer_in(None, max_steps=2).train(resume_from_checkpoint=saved)


def test_a_checkpoint_without_a_sources_state_and_with_one_too_many(saved: Path) -> None:
    trainer = trainer_in(None, sources=[*SOURCES, Counting()], max_steps=2)
    trainer.state.sources = {**trainer.state.sources, "other": Counting()}
    with pytest.raises(UserError, match="holds nothing of the source 'other'"):
        trainer.train(resume_from_checkpoint=saved)
    trainer.state.sources = {"replay": trainer.state.sources["replay"]}
    with pytest.raises(UserError, match="holds a source '0-Counting' that this run has not"):
        trainer.train(resume_from_checkpoint=saved)


def test_a_source_may_link_to_files_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(b"groups")

    class Linking(Counting):
        def save(self, folder: Path) -> None:
            super().save(folder)
            (folder / "linked.bin").hardlink_to(elsewhere)

    options = {"sources": [*SOURCES, Linking()], "save_steps": 1, "max_steps": 3, "save_total_limit": 1}
    trainer_in(tmp_path / "run", **options).train()
    trainer_in(tmp_path / "run", **options).train(resume_from_checkpoint=True)
    assert elsewhere.read_bytes() == b"groups" and elsewhere.stat().st_nlink == 2
