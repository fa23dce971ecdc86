"""Warnings of real runs, on a model that can be enumerated: silence where it learns, the right name where it does not.

Of its 400 sequences 343 are cut off at three tokens: "truncation" is what these runs are, and left aside.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_optimum import offline_groups, reward
from training_helpers import rows_of

from exact import LONGEST, PROMPT, tiny_llama
from gvpo import Group, GVPOConfig, GVPOTrainer

RATE = 3e-4
"""Learning rate times beta of a healthy run here: a step of Adam moves log-ratios by so much, implicit rewards by beta
times that."""


def config(beta: float = 0.3, faster: float = 1, **options: Any) -> GVPOConfig:
    """A config for 60 updates of 4 groups of 8, four updates a rollout; faster: multiple of the healthy rate."""
    common = {
        "beta": beta,
        "reference": "initial",
        "learning_rate": faster * RATE / beta,
        "max_steps": 60,
        "groups_per_update": 4,
        "updates_per_rollout": 4,
        "max_completion_length": LONGEST,
        "disable_tqdm": True,
        # What these runs warn of hangs on every draw.
        "rollout_dtype": "float32",
    }
    return GVPOConfig(**common | options)


History = list[dict[str, Any]]


def train(data: list[Any] | None = None, rewards: Any = reward, **options: Any) -> tuple[History, set[str]]:
    """The history of a run, and the names of its warnings."""
    trainer = GVPOTrainer(tiny_llama(), data or [{"prompt_ids": PROMPT}], rewards, config=config(**options))
    names = set(trainer.train()["warnings"])
    return trainer.history, names - {"truncation"}


def constant(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [0.5] * len(completion_ids)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_healthy_at_every_beta(beta: float, reference: str) -> None:
    assert train(beta=beta, reference=reference)[1] == set()


@pytest.mark.parametrize("updates", [1, 16])
def test_healthy_at_every_number_of_updates_per_rollout(updates: int) -> None:
    assert train(reference="rollout", updates_per_rollout=updates)[1] == set()


@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_healthy_in_the_smallest_updates(reference: str) -> None:
    """One group of two, a sixteenth of the completions, at a quarter of the rate: single updates' r2 is below -3."""
    history, names = train(num_generations=2, groups_per_update=1, faster=0.25, reference=reference, max_steps=120)
    assert names == set()
    assert min(row.get("r2", 0) for row in history) < -3


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_a_learning_rate_thirty_times_too_high(beta: float, reference: str) -> None:
    assert "divergence" in train(beta=beta, faster=30, reference=reference, max_steps=30)[1]


def test_a_policy_that_is_thrown_onto_one_completion() -> None:
    # Where such a rate throws a policy hangs on every rounding: on any machine some of these go onto one completion.
    runs = (train(beta=0.3, faster=faster, max_steps=40) for faster in (300, 400, 240, 500, 200, 600))
    assert any("collapse" in names and history[-1]["frac_reward_zero_std"] == 1 for history, names in runs)


def test_rewards_that_are_all_equal() -> None:
    history, names = train(rewards=constant, max_steps=12)
    assert names == {"no_signal"}
    assert [row["update"] for row in history if "warning/no_signal" in row] == [10, 11, 12]


def test_a_rare_reward_is_not_without_signal() -> None:
    """One sequence in 49 is rewarded: most updates have groups without a success, some have none at all."""

    def rare(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(ids[:2] == [3, 3]) for ids in completion_ids]

    history, names = train(rewards=rare)
    assert names == set()
    assert max(row["frac_reward_zero_std"] for row in history) == 1


DRIFTING = ((12, 320), (6, 400), (9, 240), (9, 320), (6, 240), (12, 240))
"""Multiples of the healthy rate, and updates."""


def few_completions() -> list[Group]:
    """Two groups of 32, the same ones over and over: nothing holds the mass on them that leaves for other sequences."""
    return offline_groups()[:2]


def test_drift_hides_behind_a_good_fit() -> None:
    options = {"groups_per_update": 2, "updates_per_rollout": 1, "beta": 0.03}
    # How far a run drifts at such rates hangs on every rounding: on any machine some of these go beyond the range.
    runs = (train(few_completions(), None, faster=n, max_steps=steps, **options) for n, steps in DRIFTING)
    last = next(history[-1] for history, names in runs if names == {"reference_drift"} and history[-1]["r2"] > 0.95)
    assert last["residual_var"] < 0.05 * last["reward_var"]
    assert train(few_completions(), None, faster=0.3, max_steps=60, **options)[1] == set()


def test_a_small_beta_goes_far_and_is_allowed_to() -> None:
    """Log-ratios of many nats are what a beta of 0.003 asks for, whichever the reference."""
    for reference in "initial", "rollout":
        options = {"learning_rate": 1e-3, "updates_per_rollout": 32, "max_steps": 64}
        history, names = train(beta=0.003, reference=reference, **options)
        assert names == set() and max(row["log_ratio/max"] for row in history) > 6


def test_residual_variance_is_twice_the_loss() -> None:
    history, _ = train(max_steps=8)
    for row in history:
        assert row["residual_var"] == pytest.approx(2 * row["loss"], rel=1e-9)
    assert any(not math.isclose(row["residual_var"], row["reward_var"], rel_tol=0.01) for row in history)


def test_a_resumed_run_warns_as_the_one_that_never_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def go(resume: Path | None = None) -> tuple[bytes, int]:
        options = config(output_dir=str(tmp_path / "run"), save_steps=4, max_steps=14, disable_tqdm=False)
        trainer = GVPOTrainer(tiny_llama(), [{"prompt_ids": PROMPT}], constant, config=options)
        assert "no_signal" in trainer.train(resume_from_checkpoint=resume)["warnings"]
        metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        return metrics, capsys.readouterr().out.count("warning: no_signal: all rewards were equal")

    whole = go()
    assert whole[1] == 1 and rows_of(tmp_path / "run" / "metrics.jsonl")[9]["warning/no_signal"] == 1
    checkpoint = tmp_path / "run" / "checkpoints"
    # Before its beginning it is news again; after it, it is not.
    assert go(checkpoint / "step-12") == (whole[0], 0)
    assert go(checkpoint / "step-8") == (whole[0], 1)
