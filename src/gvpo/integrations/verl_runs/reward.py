"""This library's reward functions, called by verl: `reward.custom_reward_function.path=pkg://` and this module."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo.groups import Completion, Group
from gvpo.rewards.calling import score_groups
from gvpo.rewards.limits import Limits
from gvpo.rewards.resolve import RewardFunction, resolve_rewards

ROW = "gvpo_row"
"""The field of `extra_info` that holds a row: prompt and columns, as JSON."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    reward_funcs: Sequence[str],
    reward_weights: Sequence[float] | None = None,
    reward_workers: int = 2,
    reward_timeout: float = 30.0,
    reward_memory: float = 4.0,
    **unused: Any,
) -> float:
    """The weighted sum of this library's reward functions for one completion, in verl's interface.

    extra_info: with the row that `gvpo export-verl` put there. reward_funcs: `module:function` or ready-made names.
    reward_workers: processes for each of verl's that compute rewards; reward_timeout, reward_memory: as in `Limits`.
    Completion ids are not known here: functions get None for them.
    Raises ValueError where no function has an opinion: verl then leaves the completion out of its group, and logs it.
    Raises UserError as `score_groups` does.
    """
    row = json.loads(extra_info[ROW])
    limits = Limits(reward_timeout, reward_memory, reward_workers)
    group = Group(row["prompt"], [Completion(text=solution_str)], columns=row["columns"])
    report = score_groups([group], _functions(tuple(reward_funcs), limits), reward_weights)
    [[reward]] = report.rewards
    if reward is None:
        raise ValueError(f"no reward function ({', '.join(reward_funcs)}) has an opinion: the completion is left out")
    return reward


def _functions(names: tuple[str, ...], limits: Limits) -> list[RewardFunction]:
    with _lock:  # verl calls from several threads, and one pool is enough
        return _resolved(names, limits)


@functools.cache
def _resolved(names: tuple[str, ...], limits: Limits) -> list[RewardFunction]:
    return resolve_rewards(list(names), limits)


_lock = threading.Lock()
