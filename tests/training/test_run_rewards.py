"""Reward functions in processes of their own, within a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from training_helpers import prompts, settings, tiny_model

from gvpo.group_files import read_groups
from gvpo.rewards.workers.pool import PooledFunction
from gvpo.sampling import TorchSampler
from gvpo.training.loop import GVPOTrainer

FUNCTIONS = """
import os, sys, time

def first(*, completion_ids, trainer_state, **columns):
    return [float(ids[0]) + trainer_state.global_step for ids in completion_ids]

def light(**arguments):
    assert "torch" not in sys.modules, "seconds for every worker"
    return first(**arguments)

def weak(*, completion_ids, log_metric, trainer_state, **columns):
    if len(completion_ids) > 1:
        log_metric("updates", trainer_state.global_step)
    if completion_ids[0][0] % 4 == 0 and len(completion_ids) == 1:
        os._exit(3)
    if any(ids[0] % 4 == 0 for ids in completion_ids):
        time.sleep(60)
    return [float(ids[0]) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "judging.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(function: str, **overrides: Any) -> GVPOTrainer:
    trainer = GVPOTrainer(tiny_model(), prompts(), f"judging:{function}", config=settings(**overrides))
    trainer.train()
    return trainer


def test_a_run_is_the_same_in_the_training_process_and_in_others() -> None:
    apart = train("first", max_steps=4)
    assert isinstance(apart.plan.reward_functions[0].function, PooledFunction)
    assert apart.history == train("first", max_steps=4, reward_workers=0).history
    assert len({row["reward"] for row in apart.history}) == 4


def test_a_worker_need_not_import_torch_for_the_trainers_state() -> None:
    assert train("light", max_steps=2).history[0]["reward"] > 0


def test_who_gets_no_answer_leaves_the_group_is_counted_and_told_of() -> None:
    trainer = train("weak", max_steps=2, reward_timeout=1.0, reward_workers=4, output_dir="run")
    first, second = trainer.history
    [file] = Path("run/completions").glob("rollout-*")
    drawn = [one for group in read_groups(file) for one in group.completions]
    lost = [one for one in drawn if one.token_ids[0] % 4 == 0]
    assert lost and len(lost) < len(drawn)
    assert {one.reward for one in lost} == {None}
    assert [one.reward for one in drawn if one not in lost] == [one.token_ids[0] for one in drawn if one not in lost]
    assert first["rewards/failed/exit"] == second["rewards/failed/exit"] == len(lost)
    assert first["members/dropped"] + second["members/dropped"] >= len(lost)
    assert first["warning/failing_rewards"] == 1.0


def test_rewards_begin_while_others_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group's calls are done before the sampler has handed over the last."""
    submitted, done_before_the_last = [], []
    submit, sample = PooledFunction.submit, TorchSampler.sample_one_by_one

    def note(self: Any, *arguments: Any) -> Any:
        submitted.append(submit(self, *arguments))
        return submitted[-1]

    def slowly(self: Any, asked: Any, *arguments: Any, drawn: Any, **named: Any) -> None:
        def hand_over(place: int, samples: Any) -> None:
            if len(submitted) == len(asked) - 1:
                deadline = time.monotonic() + 20
                while not submitted[0].done() and time.monotonic() < deadline:
                    time.sleep(0.01)
                done_before_the_last.append(submitted[0].done())
            drawn(place, samples)

        sample(self, asked, *arguments, drawn=hand_over, **named)

    monkeypatch.setattr(PooledFunction, "submit", note)
    monkeypatch.setattr(TorchSampler, "sample_one_by_one", slowly)
    train("first", max_steps=2)
    assert done_before_the_last == [True]
    assert len(submitted) == 4
