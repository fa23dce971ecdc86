"""Every number of an update's row, against the same number worked out another way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from training_helpers import naive_logprob, offline_groups, run, tiny_model

from gvpo.evaluation.evaluator import evaluation_metrics
from gvpo.groups import Completion, Group
from gvpo.training.metrics import Member, members_of, update_metrics


def member(group: int, reward: float, logp: float = -1.0, ref_logp: float = -1.0, **changes: object) -> Member:
    values = {"tokens": 3, "truncated": False, "source": "policy", "by_function": {}, **changes}
    return Member(group, reward, logp, ref_logp, **values)  # pyright: ignore[reportArgumentType]


def test_members_carry_what_the_groups_say() -> None:
    groups = [
        Group(
            None,
            [
                Completion(None, [1, 2], reward=1.0, truncated=True, meta={"update": 3}),
                Completion(None, [3], reward=0.0, meta={"update": 1}),
            ],
            prompt_ids=[1],
        ),
        Group(
            None, [Completion(None, [4], reward=2.0, source="teacher", meta={"rewards": {"f": 2.0}})], prompt_ids=[2]
        ),
    ]
    logps, refs = [-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5]
    assert members_of(groups, [7, 9], logps, refs, update=5) == [
        Member(7, 1.0, -1.0, -1.5, 2, True, "policy", {}, staleness=2),
        Member(7, 0.0, -2.0, -2.5, 1, False, "policy", {}, staleness=4),
        Member(9, 2.0, -3.0, -3.5, 1, False, "teacher", {"f": 2.0}),
    ]


def test_rewards_by_hand() -> None:
    members = [member(0, 0.0), member(0, 4.0), member(5, 1.0), member(5, 1.0), member(5, 1.0)]
    row = update_metrics(members, beta=0.1, dropped=2)
    assert row["reward"] == pytest.approx(7 / 5)
    assert row["reward_std"] == pytest.approx((2 + 0) / 2)  # of 0 and 4: 2; of three ones: 0
    assert row["reward_var"] == pytest.approx((8 + 0) / 2)
    assert (row["reward_min"], row["reward_max"]) == (0.0, 4.0)
    assert row["frac_reward_zero_std"] == 0.5
    assert row["groups"] == 2 and row["members/dropped"] == 2


def test_log_ratios_and_fit_by_hand() -> None:
    # Log-ratios 2 and 0: implicit rewards 1 and 0 at beta 0.5, centred 0.5 and -0.5; centred rewards 1 and -1.
    row = update_metrics([member(0, 2.0, -1.0, -3.0), member(0, 0.0, -4.0, -4.0)], beta=0.5)
    assert (row["log_ratio/mean"], row["log_ratio/std"], row["log_ratio/max"]) == (1.0, 1.0, 2.0)
    assert row["r2"] == pytest.approx(1 - 2 * 0.5**2 / 2)
    assert row["residual_var"] == pytest.approx(2 * 0.5**2)
    assert update_metrics([member(0, 0.0, -9.0, -1.0), member(0, 0.0)], beta=1)["log_ratio/max"] == 8.0


def test_the_spread_within_groups_is_blind_to_what_differs_between_them() -> None:
    """Log-ratios 2, 0 and 50, 54: within the groups 1 and 2, over all of them far more."""
    members = [member(0, 1.0, 2.0, 0.0), member(0, 0.0, 0.0, 0.0), member(1, 0.0, 50.0, 0.0), member(1, 3.0, 54.0, 0.0)]
    row = update_metrics(members, beta=0.5)
    assert row["log_ratio/group_std"] == pytest.approx(1.5) and row["log_ratio/std"] > 25
    # Residuals 0, 0 and -25, -24: variances 0 and 1/2.
    assert row["residual_var"] == pytest.approx(0.25)
    assert row["reward_var"] == pytest.approx((0.5 + 4.5) / 2)


def test_at_the_optimum_everything_is_explained() -> None:
    row = update_metrics([member(0, r, logp=r / 0.1 - 7.0, ref_logp=-3.0) for r in (0.0, 0.3, 1.0)], beta=0.1)
    assert row["r2"] == pytest.approx(1.0) and row["residual_var"] == pytest.approx(0.0)
    assert 0.1 * row["log_ratio/group_std"] == pytest.approx(row["reward_std"])


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 1e9 / 3])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_equal_rewards_leave_nothing_to_explain(reward: float, k: int) -> None:
    members = [member(0, reward, logp=-float(n)) for n in range(k)]
    assert "r2" not in update_metrics(members, beta=0.1)


def test_completions_by_hand() -> None:
    members = [
        member(0, 0.0, tokens=2, truncated=True, source="policy", by_function={"f": 1.0, "g": 4.0}),
        member(0, 1.0, tokens=6, source="teacher", by_function={"f": 2.0}),
        member(1, 1.0, tokens=4, source="policy"),
        member(1, 1.0, tokens=4, source="policy"),
    ]
    row = update_metrics(members, beta=0.1)
    assert (row["completions/mean_length"], row["completions/max_length"], row["completions/truncated"]) == (4, 6, 0.25)
    assert (row["source/policy"], row["source/teacher"]) == (0.75, 0.25)
    assert (row["rewards/f/mean"], row["rewards/g/mean"]) == (1.5, 4.0)


def test_no_members() -> None:
    assert update_metrics([], beta=0.1, dropped=3) == {"members/dropped": 3.0}


def test_a_row_of_training_against_plain_arithmetic(tmp_path: Path) -> None:
    """Policy and reference are two models, and nothing moves: the row follows from their log-probs alone."""
    policy, reference = tiny_model(0), tiny_model(7)
    reference.save_pretrained(tmp_path)
    data = offline_groups(3, sizes=(3, 2, 5))
    beta = 0.4
    (row,) = run(
        policy, data, reference=str(tmp_path), learning_rate=0, max_steps=1, groups_per_update=3, updates_per_rollout=1,
        beta=beta, max_grad_norm=0,
    ).history  # fmt: skip

    losses, parts, ratios, stds = [], [], [], []
    explained = total = 0.0
    for group in data:
        logps, refs = (
            np.array([naive_logprob(model, group.prompt_ids or [], c.token_ids or []) for c in group.completions])
            for model in (policy, reference)
        )
        rewards = np.array(group.rewards, dtype=float)
        implicit = beta * (logps - refs)
        residual = (implicit - implicit.mean()) - (rewards - rewards.mean())
        losses.append((residual**2).sum() / (group.k - 1) / 2)
        covariance = np.cov(np.stack([logps, refs, rewards]))
        parts.append([covariance[0, 2], covariance[0, 1], covariance[0, 0], np.var(rewards + beta * refs, ddof=1) / 2])
        ratios += (logps - refs).tolist()
        stds.append(rewards.std())
        explained += (residual**2).sum()
        total += ((rewards - rewards.mean()) ** 2).sum()
    assert max(map(abs, ratios)) > 3
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for name, expected in zip(("reward_cov", "ref_cov", "var", "constant"), np.mean(parts, 0), strict=True):
        assert row[name] == pytest.approx(expected, rel=1e-4)
    identity = -beta * row["reward_cov"] - beta**2 * row["ref_cov"] + beta**2 / 2 * row["var"] + row["constant"]
    assert row["loss"] == pytest.approx(identity, rel=1e-6)
    assert row["residual_var"] == pytest.approx(2 * row["loss"], rel=1e-6)
    assert row["log_ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-3)
    assert row["log_ratio/std"] == pytest.approx(np.std(ratios), rel=1e-3)
    assert row["log_ratio/max"] == pytest.approx(np.max(np.abs(ratios)), rel=1e-3)
    assert row["r2"] == pytest.approx(1 - explained / total, rel=1e-3)
    rewards = [c.reward or 0.0 for g in data for c in g.completions]
    assert row["reward"] == pytest.approx(np.mean(rewards)) and row["reward_std"] == pytest.approx(np.mean(stds))
    lengths = [len(c.token_ids or []) for g in data for c in g.completions]
    assert row["completions/mean_length"] == np.mean(lengths) and row["completions/max_length"] == max(lengths)
    assert (row["update"], row["rollout"], row["epoch"], row["groups"]) == (1, 1, 1.0, 3)
    assert all(math.isfinite(value) for value in row.values())


def test_evaluation_by_hand() -> None:
    answers = [
        Group("p", [Completion("a", [1, 2], reward=1.0, meta={"rewards": {"f": 1.0}})]),
        Group("q", [Completion("b", [1, 2, 3, 4], reward=None, truncated=True)]),
        Group("r", [Completion("c", [1, 2, 3], reward=0.5, meta={"rewards": {"f": 0.25, "g": 2.0}})]),
    ]
    assert evaluation_metrics(answers) == {
        "eval/reward": 0.75,
        "eval/rewards/f/mean": 0.625,
        "eval/rewards/g/mean": 2.0,
        "eval/unscored": 1,
        "eval/completions/mean_length": 3.0,
        "eval/completions/truncated": pytest.approx(1 / 3),
    }
