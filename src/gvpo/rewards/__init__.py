"""Rewards: functions called as TRL calls them, found by name, with a few ready-made ones."""

from __future__ import annotations

from gvpo.rewards.calling import RewardReport, score_groups
from gvpo.rewards.ready import READY
from gvpo.rewards.resolve import RewardFunction, resolve_rewards

__all__ = ["READY", "RewardFunction", "RewardReport", "resolve_rewards", "score_groups"]
