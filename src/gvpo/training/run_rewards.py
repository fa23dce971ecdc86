"""A run's reward functions at work."""

from __future__ import annotations

from collections import Counter

from transformers import TrainerState

from gvpo.groups import Group
from gvpo.rewards.calling import Scoring
from gvpo.rewards.fill import failures_by_cause, fill_from
from gvpo.sources.dataset import Row
from gvpo.sources.fill import unrewarded
from gvpo.training.config import GVPOConfig
from gvpo.training.health import FAILED
from gvpo.training.plan import RunPlan
from gvpo.training.processes import OneProcess


class RunRewards:
    """total_updates: of the run, which functions are told."""

    def __init__(self, plan: RunPlan, config: GVPOConfig, processes: OneProcess, total_updates: int) -> None:
        self._plan, self._weights = plan, config.reward_weights
        self._processes, self._total_updates = processes, total_updates

    def begin(self, update: int, epoch: float) -> RolloutRewards:
        """The rewards of one rollout or evaluation, after so many updates and passes over the data."""
        state = TrainerState(global_step=update, max_steps=self._total_updates, epoch=epoch)
        how = {"columns": self._plan.columns, "trainer_state": state}
        return RolloutRewards(Scoring(self._plan.reward_functions, self._weights, **how), self._processes)


class RolloutRewards:
    """Groups to rewards; functions that run in processes of their own begin with a group while others are drawn."""

    def __init__(self, scoring: Scoring, processes: OneProcess) -> None:
        self._scoring, self._processes = scoring, processes

    def start(self, row: Row, group: Group) -> None:
        """Have what a row's group needs of rewards begun, where it can."""
        for asked in unrewarded([row], [group]):
            self._scoring.start(asked)

    def fill(self, groups: list[Group]) -> dict[str, float]:
        """Rewards in place. Returns what functions logged, over all processes, and whom they failed, by cause."""
        logged = self._processes.mean(fill_from(self._scoring, groups), sum(group.k for group in groups))
        failed = sum(self._processes.interleave([failures_by_cause(groups)]), Counter[str]())
        return logged | {f"{FAILED}{cause}": float(failed[cause]) for cause in sorted(failed)}
