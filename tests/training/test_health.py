"""Warnings on histories made by hand: when each begins, what it says, and what must not set it off."""

from __future__ import annotations

from typing import Any

import pytest
from training_helpers import settings

from gvpo.training.health import RETURN_AFTER, mark, names_seen, symptoms

GOOD = {
    "reward": 0.5,
    "reward_min": 0.0,
    "reward_max": 1.0,
    "reward_var": 0.25,
    "residual_var": 0.1,
    "frac_reward_zero_std": 0.25,
    "log_ratio/mean": -3.0,
    "completions/truncated": 0.1,
    "source/policy": 1.0,
    "grad_norm": 1.0,
}
"""Rewards 0 and 1 half of the time each, mostly fitted, at beta 0.1: log-ratios may reach 10."""


def rows(count: int, start: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Updates alike; a change to None leaves a metric out. `/` is written as `__`."""
    row = {**GOOD, **{name.replace("__", "/"): value for name, value in changes.items()}}
    kept = {name: value for name, value in row.items() if value is not None}
    return [{"update": update, **kept} for update in range(start, start + count)]


def names(history: list[dict[str, Any]], **config: Any) -> list[str]:
    return [one.name for one in symptoms(history, settings(**{"groups_per_update": 8, **config}))]


def text(history: list[dict[str, Any]], **config: Any) -> str:
    (one,) = symptoms(history, settings(**{"groups_per_update": 8, **config}))
    return one.text


def test_nothing_wrong() -> None:
    assert names(rows(100)) == []
    assert names([]) == names([{"update": 0, "eval/reward": 0.1}]) == []
    assert names([{"update": n} for n in range(1, 3)] + rows(1, start=3)) == []


EQUAL = {"frac_reward_zero_std": 1.0, "reward": 0.0, "reward_max": 0.0, "reward_var": 0.0, "residual_var": 0.0}


class TestNoSignal:
    def test_begins_after_ten_updates(self) -> None:
        assert names(rows(9, **EQUAL)) == []
        assert names(rows(10, **EQUAL)) == ["no_signal"]
        assert text(rows(10, **EQUAL)).endswith("0 on average: raise num_generations (now 3)")

    def test_of_a_dataset_no_more_completions_can_be_drawn(self) -> None:
        offline = rows(10, **EQUAL, source__policy=None)
        assert text(offline).endswith("give train_dataset groups whose rewards differ")

    def test_small_updates_take_until_forty_groups(self) -> None:
        assert names(rows(39, **EQUAL), groups_per_update=1) == []
        assert names(rows(40, **EQUAL), groups_per_update=1) == ["no_signal"]

    def test_one_group_with_signal_is_enough(self) -> None:
        history = rows(9, **EQUAL) + rows(1, 10) + rows(9, 11, **EQUAL)
        assert names(history) == []

    def test_evaluations_before_the_start_do_not_count(self) -> None:
        assert names([{"update": 0, "eval/reward": 0.0}, *rows(9, **EQUAL)]) == []

    def test_lost_below_the_best_is_collapse(self) -> None:
        lost = rows(5) + rows(10, 6, **EQUAL)
        assert names(lost) == ["collapse"]
        assert text(lost).endswith("0 on average where 1 was seen before: lower learning_rate (now 0.01)")

    def test_lost_at_the_best_is_success(self) -> None:
        assert names(rows(5) + rows(10, 6, **EQUAL | {"reward": 0.96, "reward_max": 1.0})) == []


class TestDivergence:
    def test_residuals_of_twice_the_rewards_variance(self) -> None:
        assert names(rows(20, residual_var=0.49)) == []
        assert names(rows(19, residual_var=9.0)) == []
        assert names(rows(20, residual_var=0.51)) == ["divergence"]
        assert "2.04 times" in text(rows(20, residual_var=0.51)) and "(now 0.01)" in text(rows(20, residual_var=0.51))

    def test_small_updates_take_until_forty_groups(self) -> None:
        assert names(rows(39, residual_var=9.0), groups_per_update=1) == []
        assert names(rows(40, residual_var=9.0), groups_per_update=1) == ["divergence"]

    def test_an_overshoot_of_the_first_updates_is_not(self) -> None:
        # Mean residual (5 * 1.2 + 15 * 0.1) / 20 = 0.375, one and a half times the rewards'.
        assert names(rows(5, residual_var=1.2) + rows(15, 6)) == []

    def test_rewards_that_have_become_alike_are_not(self) -> None:
        alike = {"reward_var": 1e-4, "residual_var": 0.01}
        assert names(rows(20) + rows(20, 21, **alike)) == []
        assert names(rows(20, **alike)) == ["divergence"]

    def test_rewards_that_have_come_to_differ_more_are_not(self) -> None:
        # Against the run's mean, (60 * 0.01 + 20 * 0.25) / 80 = 0.07, the residuals would be nearly six times as much.
        history = rows(60, reward_var=0.01, residual_var=0.005) + rows(20, 61, residual_var=0.4)
        assert names(history) == []

    def test_equal_rewards_all_along_have_no_measure(self) -> None:
        equal = rows(20, reward_var=0.0, residual_var=1e-30)
        assert names(equal) == []

    def test_the_policy_as_its_own_reference_is_not(self) -> None:
        assert names(rows(50, residual_var=0.25, log_ratio__mean=0.0, r2=0.0)) == []


class TestReferenceDrift:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_beyond_what_the_rewards_range_allows(self, sign: int) -> None:
        assert names(rows(20, log_ratio__mean=sign * 9.9)) == []
        assert names(rows(20, log_ratio__mean=sign * 10.1)) == ["reference_drift"]
        assert "beyond the 10 that" in text(rows(20, log_ratio__mean=sign * 10.1))

    def test_the_range_is_the_runs(self) -> None:
        assert names(rows(1, reward_min=-1.0) + rows(20, 2, log_ratio__mean=-19.0)) == []

    def test_a_smaller_beta_allows_more(self) -> None:
        assert names(rows(20, log_ratio__mean=-40.0), beta=0.01) == []


def test_other_objectives_are_not_held_to_the_fit() -> None:
    config = settings().model_copy(update={"objective": "grpo", "beta": 0.0})
    history = rows(40, residual_var=9.0, log_ratio__mean=99.0)
    assert symptoms(history, config) == []
    assert [one.name for one in symptoms(rows(40, **EQUAL), config)] == ["no_signal"]
    assert symptoms(history, settings().model_copy(update={"beta": 0.0}))[0].name == "divergence"


def test_truncation_of_what_the_policy_draws() -> None:
    assert names(rows(9, completions__truncated=1.0)) == names(rows(10, completions__truncated=0.89)) == []
    assert "(now 4)" in text(rows(10, completions__truncated=0.95))
    assert names(rows(10, completions__truncated=0.95, source__policy=None, source__dataset=1.0)) == []


def test_reward_functions_that_fail() -> None:
    failing = rows(3, rewards__failed__hang=2.0, rewards__failed__exit=1.0)
    assert names(failing) == ["failing_rewards"]
    assert "3 completions of the last rollout no answer (2 hang, 1 exit)" in text(failing)
    # The last rollout counts, and a reward function of that name is none of ours.
    assert names([*failing, *rows(1, start=4)]) == names(rows(1, rewards__failed__mean=1.0)) == []


def test_no_groups_at_once_from_the_start_and_after_three_later() -> None:
    empty = [{"update": n, "members/dropped": 24.0} for n in range(1, 30)]
    assert names(empty[:1]) == ["no_groups"]
    assert names(rows(5) + empty[5:7]) == []
    assert names(rows(5) + empty[5:8]) == ["no_groups"]


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_any_metric_may_be_absent(missing: str) -> None:
    bad = {"residual_var": 9.0, "log_ratio__mean": 99.0, "completions__truncated": 1.0}
    alarms = names(rows(40, **bad | {missing.replace("/", "__"): None}))
    assert {"divergence", "reference_drift", "truncation"} - set(alarms) <= {
        "residual_var": {"divergence"},
        "reward_var": {"divergence"},
        "log_ratio/mean": {"reference_drift"},
        "reward_max": {"reference_drift"},
        "reward_min": set(),
        "completions/truncated": {"truncation"},
        "source/policy": {"truncation"},
    }.get(missing, set())


def test_a_warning_is_news_when_it_begins_and_when_it_comes_back() -> None:
    """Nine cut-off updates in ten are enough: it is on at 10 to 31, 49 to 56, and from 113, 57 updates later."""
    assert 49 - 31 < RETURN_AFTER < 113 - 56
    config, history, told = settings(), [], []
    cut = {*range(1, 31), *range(41, 56), *range(105, 130)}
    for update in range(1, 130):
        history += rows(1, update, completions__truncated=float(update in cut))
        told += [update for _ in mark(history, config)]
    marked = [row["update"] for row in history if row.get("warning/truncation") == 1.0]
    assert marked == [*range(10, 32), *range(49, 57), *range(113, 130)]
    assert told == [10, 113]
    assert names_seen(history) == ["truncation"]


def test_an_evaluation_before_the_start_is_not_marked() -> None:
    history = [{"update": 0, "eval/reward": 0.5}]
    assert mark(history, settings()) == [] and history == [{"update": 0, "eval/reward": 0.5}]
