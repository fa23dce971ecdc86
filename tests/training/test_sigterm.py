"""SIGTERM: the run saves a checkpoint, exits with 143, and goes on from there as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import POINTS, differences, strike, trainer_in
from training_helpers import prompts, rows_of, settings, tiny_model

from gvpo.cli.main import main
from gvpo.errors import UserError
from gvpo.report.terminal import ProgressDisplay
from gvpo.training import checkpoint
from gvpo.training.loop import GVPOTrainer
from gvpo.training.preemption import Sigterm, StopNow, Stopped
from gvpo.training.processes import OneProcess
from gvpo.training.run_folder import leftovers


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nobody interrupts; it has a checkpoint at its end."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_in(folder, save_steps=6).train()
    return folder


STRIKES = [
    # where, at which call, after which update the run has stopped, and whether its row waits for the evaluation
    ("sampling", 1, 0, False),  # in the evaluation before the start
    ("sampling", 6, 0, False),
    ("sampling", 14, 2, False),
    ("reward", 4, 0, False),
    ("reward", 16, 2, True),  # of the evaluation
    ("reward", 19, 2, False),
    ("reference", 1, 0, False),
    ("reference", 3, 2, False),
    ("backward", 1, 1, False),
    ("backward", 2, 2, True),
    ("step", 3, 3, False),
    ("after the step", 4, 4, True),
    ("evaluation", 2, 2, True),
    ("evaluation", 4, 6, True),
    ("completions", 4, 2, False),
    ("rows", 3, 1, False),
    ("checkpoint", 1, 6, False),
]


@pytest.mark.parametrize(("phase", "call", "stopped_after", "waiting"), STRIKES)
def test_a_run_stops_in_every_phase_and_goes_on(
    phase: str, call: int, stopped_after: int, waiting: bool, tmp_path: Path, whole: Path
) -> None:
    trainer = trainer_in(tmp_path, save_steps=6)
    before = signal.getsignal(signal.SIGTERM)
    undo = strike(POINTS[phase](trainer), call, terminate)
    try:
        if phase == "checkpoint":  # nothing is left to do but the end
            trainer.train()
        else:
            with pytest.raises(Stopped) as caught:
                trainer.train()
            assert (caught.value.code, caught.value.update) == (143, stopped_after)
            assert caught.value.checkpoint == tmp_path / "checkpoints" / f"step-{stopped_after}"
    finally:
        undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert all(p.grad is None for p in trainer.model.parameters())
    assert leftovers(tmp_path) == []
    (last,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((last / "state.json").read_text())["state"]
    assert (last.name, state["row"] is not None) == (f"step-{stopped_after}", waiting)
    assert rows_of(last / "metrics.jsonl") == trainer.history

    again = trainer_in(tmp_path, seed=5, save_steps=6)
    again.train(resume_from_checkpoint=True)
    assert differences(tmp_path, whole) == []


def test_what_was_begun_is_put_back(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    undo = strike(POINTS["reference"](trainer), 3, terminate)
    with pytest.raises(Stopped):
        trainer.train()
    undo()
    progress = trainer.progress
    assert (progress.update, progress.rollout, progress.position, progress.batch) == (2, 1, 4, 0)
    assert progress.groups == [] and progress.generated_tokens == trainer.history[-1]["generated_tokens"]
    (saved,) = checkpoint._read_state(tmp_path / "checkpoints" / "step-2")["generators"]
    assert json.loads(json.dumps(random.getstate())) == saved["python"]
    assert np.random.get_state()[1].tolist() == saved["numpy"]["state"]["key"]  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), trainer.state.mark.random.torch["torch"])


def test_the_display_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    real = ProgressDisplay.__exit__
    monkeypatch.setattr(ProgressDisplay, "__exit__", lambda self, *args: closed.append(1) or real(self, *args))
    trainer = trainer_in(tmp_path)
    undo = strike(POINTS["reward"](trainer), 9, terminate)
    with pytest.raises(Stopped):
        trainer.train()
    undo()
    assert closed == [1]


def test_an_earlier_handler_is_back_and_was_not_called(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        trainer = trainer_in(tmp_path)
        undo = strike(POINTS["backward"](trainer), 1, terminate)
        with pytest.raises(Stopped):
            trainer.train()
        undo()
        assert heard == []
        terminate()
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_folder_sigterm_is_as_ever(tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        trainer = trainer_in(None)
        undo = strike(POINTS["backward"](trainer), 1, terminate)
        trainer.train()
        undo()
        assert heard == [1] and trainer.history[-1]["update"] == 6
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_a_run_trains_without_listening(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.history[-1]["update"] == 1


def test_a_reward_function_that_catches_everything_delays_it_to_the_end_of_the_phase(tmp_path: Path) -> None:
    calls = []

    def deaf(completion_ids: Any, **kwargs: Any) -> list[float]:
        calls.append(1)
        with suppress(BaseException):
            terminate()
        return [ids[0] / 16 for ids in completion_ids]

    config = settings(output_dir=str(tmp_path))
    with pytest.raises(Stopped) as caught:
        GVPOTrainer(tiny_model(), prompts(), deaf, config=config).train()
    assert caught.value.update == 0 and calls == [1]


def test_an_asynchronous_reward_function_is_left_at_once(tmp_path: Path) -> None:
    import asyncio

    async def endless(completion_ids: Any, **kwargs: Any) -> list[float]:
        terminate()
        await asyncio.sleep(600)
        return []

    config = settings(output_dir=str(tmp_path))
    with pytest.raises(Stopped):
        GVPOTrainer(tiny_model(), prompts(), endless, config=config).train()


def test_a_full_disk_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path, save_steps=2)
    undo = strike(POINTS["step"](trainer), 3, terminate)
    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-3" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="no space left"):
        trainer.train()
    undo()
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_signal_outside_an_interruptible_block_waits() -> None:
    with Sigterm(True, at_once=True) as sigterm:
        terminate()
        assert sigterm.requested
        with pytest.raises(StopNow), sigterm.interruptible():
            pytest.fail("entered")
        with pytest.raises(StopNow):
            sigterm.look()
    with Sigterm(True, at_once=False) as sigterm:
        with sigterm.interruptible():
            terminate()
        sigterm.look()
        with pytest.raises(StopNow):
            sigterm.look_together(OneProcess())


class TestCommand:
    """`gvpo train`, told to stop."""

    def test_one_line_says_how_to_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stopped(self: GVPOTrainer, resume_from_checkpoint: Any = None) -> None:
            self.total_updates = 9
            raise Stopped(4, Path("run/checkpoints/step-4"))

        monkeypatch.setattr(GVPOTrainer, "train", stopped)
        monkeypatch.setattr(GVPOTrainer, "__init__", lambda self, *args, **kwargs: None)
        assert main(["train", "--train_dataset", "rows.jsonl", "--output_dir", str(tmp_path / "run")]) == 143
        (line,) = capsys.readouterr().out.splitlines()
        assert "after update 4 of 9" in line and "run/checkpoints/step-4" in line and "latest" in line
