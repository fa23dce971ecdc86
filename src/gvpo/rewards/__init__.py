"""Rewards: functions called as TRL calls them, found by name, run where they cannot hang a run, with ready-made ones.

Public names are imported when they are used: a config or a help text needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvpo.rewards.calling import RewardReport as RewardReport
    from gvpo.rewards.calling import score_groups as score_groups
    from gvpo.rewards.code import code_accuracy as code_accuracy
    from gvpo.rewards.guard import guarded as guarded
    from gvpo.rewards.gym import reasoning_gym_score as reasoning_gym_score
    from gvpo.rewards.judge import judge_accuracy as judge_accuracy
    from gvpo.rewards.math import math_accuracy as math_accuracy
    from gvpo.rewards.ready import READY as READY
    from gvpo.rewards.ready import exact_match as exact_match
    from gvpo.rewards.ready import gsm8k_answer as gsm8k_answer
    from gvpo.rewards.ready import last_number as last_number
    from gvpo.rewards.resolve import RewardFunction as RewardFunction
    from gvpo.rewards.resolve import resolve_rewards as resolve_rewards
    from gvpo.rewards.shape import boxed_format as boxed_format
    from gvpo.rewards.shape import soft_length as soft_length
    from gvpo.rewards.shape import think_format as think_format

_HOME = {
    "READY": "gvpo.rewards.ready",
    "RewardFunction": "gvpo.rewards.resolve",
    "RewardReport": "gvpo.rewards.calling",
    "boxed_format": "gvpo.rewards.shape",
    "code_accuracy": "gvpo.rewards.code",
    "exact_match": "gvpo.rewards.ready",
    "gsm8k_answer": "gvpo.rewards.ready",
    "guarded": "gvpo.rewards.guard",
    "judge_accuracy": "gvpo.rewards.judge",
    "last_number": "gvpo.rewards.ready",
    "math_accuracy": "gvpo.rewards.math",
    "reasoning_gym_score": "gvpo.rewards.gym",
    "resolve_rewards": "gvpo.rewards.resolve",
    "score_groups": "gvpo.rewards.calling",
    "soft_length": "gvpo.rewards.shape",
    "think_format": "gvpo.rewards.shape",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
