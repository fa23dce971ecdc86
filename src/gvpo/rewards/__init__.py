"""Rewards: functions called as TRL calls them, found by name, run where they cannot hang a run, with ready-made ones.

Public names are imported when they are used: a config or a help text needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo.rewards.calling import RewardReport as RewardReport
    from gvpo.rewards.calling import score_groups as score_groups
    from gvpo.rewards.guard import guarded as guarded
    from gvpo.rewards.math import math_accuracy as math_accuracy
    from gvpo.rewards.ready import READY as READY
    from gvpo.rewards.resolve import RewardFunction as RewardFunction
    from gvpo.rewards.resolve import resolve_rewards as resolve_rewards

_HOME = {
    "READY": "gvpo.rewards.ready",
    "RewardFunction": "gvpo.rewards.resolve",
    "RewardReport": "gvpo.rewards.calling",
    "guarded": "gvpo.rewards.guard",
    "math_accuracy": "gvpo.rewards.math",
    "resolve_rewards": "gvpo.rewards.resolve",
    "score_groups": "gvpo.rewards.calling",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
