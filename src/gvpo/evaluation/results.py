"""Scored groups to numbers: what a run's results.json holds."""

from __future__ import annotations

import importlib.metadata
import platform
import zlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from gvpo.evaluation import estimators
from gvpo.evaluation.run import UNCOMPARED, is_right
from gvpo.groups import Completion, Group
from gvpo.rewards.fill import failures_by_cause

VERSIONS = ("gvpo", "torch", "transformers", "numpy", "math-verify", "reasoning-gym", "vllm")


def suite_results(settings: Mapping[str, Any], groups: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    """The results of a run, without a date: equal runs have equal results.

    groups: all of each task's. The average is over tasks, each with the same weight, and has an interval where the
    bootstrap gives every task one.
    """
    seed = settings["seed"]
    tasks = {name: task_results(some, _seeds(seed, name)) for name, some in groups.items()}
    return {
        "settings": dict(settings),
        "versions": versions(),
        "tasks": tasks,
        "average": _average(tasks, groups, seed),
    }


def task_results(groups: Sequence[Group], seed: Sequence[int]) -> dict[str, Any]:
    """The results of one task: equally many completions of every problem. seed: of the bootstrap.

    Shares are in [0, 1]; lengths in tokens, None where there is nothing to measure. mean_reward: of those with a
    verdict; None where all are 0 or 1, and it says nothing more. failures: of the reward function, by cause.
    uncompared: comparisons of answers that failed, for maj@k.
    """
    k = groups[0].k
    completions = [one for group in groups for one in group.completions]
    right_P = right_counts(groups)
    results = {
        "problems": len(groups),
        "num_samples": k,
        "pass@1": estimators.mean_at_k(right_P, k),
        "interval": estimators.interval([right / k for right in right_P], seed),
        "right": sum(right_P),
        "unscored": sum(one.reward is None for one in completions),
        "failures": dict(sorted(failures_by_cause(groups).items())),
        "truncated": fmean(one.truncated for one in completions),
        "without_answer": fmean(one.meta.get("answer") is None for one in completions),
        "mean_reward": _mean_reward([one.reward for one in completions if one.reward is not None]),
        "mean_length": _mean([_tokens(one, shared=True) for one in completions]),
        "mean_length_right": _mean([_tokens(one) for one in completions if is_right(one)]),
        "mean_length_wrong": _mean([_tokens(one) for one in completions if not is_right(one)]),
    }
    if k > 1:
        results["maj@k"] = fmean(float(_majority(group)) for group in groups)
        results["uncompared"] = sum(group.completions[0].meta.get(UNCOMPARED, 0) for group in groups)
        results["pass@"] = {str(j): estimators.mean_pass_at(j, right_P, k) for j in estimators.doublings(k)}
    return results


def right_counts(groups: Sequence[Group]) -> list[int]:
    """How many of each problem's completions are right."""
    return [sum(map(is_right, group.completions)) for group in groups]


def versions() -> dict[str, str]:
    """Of what the numbers depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _majority(group: Group) -> Any:
    votes = [one.meta.get("vote") for one in group.completions]
    return estimators.majority(votes, [is_right(one) for one in group.completions])


def _average(
    tasks: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[Group]], seed: int
) -> dict[str, Any]:
    average: dict[str, Any] = {"pass@1": fmean(task["pass@1"] for task in tasks.values()), "interval": None}
    if all(task["interval"]["by"] == "bootstrap" for task in tasks.values()):
        means = [
            estimators.resampled_means([right / some[0].k for right in right_counts(some)], _seeds(seed, name))
            for name, some in groups.items()
        ]
        low, high = estimators.percentiles(np.mean(means, axis=0))
        average["interval"] = {"low": low, "high": high, "by": "bootstrap"}
    return average


def _seeds(seed: int, task: str) -> list[int]:
    # Tasks are resampled independently of each other, and alike in whatever suite they come.
    return [seed, zlib.crc32(task.encode())]


def _tokens(completion: Completion, *, shared: bool = False) -> float | None:
    """A completion's length; shared: a server's mean over several will do."""
    if completion.token_ids is not None:
        return len(completion.token_ids)
    meta = completion.meta
    return meta.get("tokens", meta.get("mean_tokens") if shared else None)


def _mean_reward(rewards: Sequence[float]) -> float | None:
    return None if set(rewards) <= {0.0, 1.0} else fmean(rewards)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
