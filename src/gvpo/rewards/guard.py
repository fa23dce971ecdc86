"""Reward functions for other trainers, called in processes that can be killed."""

from __future__ import annotations

import threading

from gvpo.rewards.limits import Limits
from gvpo.rewards.workers.pool import PooledFunction, RewardPool


def guarded(entry: str, *, seconds: float = 30.0, memory: float = 4.0, workers: int | None = None) -> PooledFunction:
    """`module:function` as a reward function that cannot hang, crash or exhaust the process that calls it.

    seconds, memory, workers: as in `Limits`. Equal arguments share one pool, which lives as long as this process.
    A member whose call fails gets None. Works in any thread and process, with TRL's trainers too.
    Raises UserError where the module cannot be imported or has no such function.
    """
    key = (entry, Limits(seconds, memory, workers))
    with _lock:
        if key not in _made or not _made[key].pool.alive:
            (_made[key],) = RewardPool([entry], key[1]).functions
        return _made[key]


_lock = threading.Lock()
_made: dict[tuple[str, Limits], PooledFunction] = {}
