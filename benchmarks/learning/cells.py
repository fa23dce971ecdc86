"""What is compared: a cell is one setting of one method, run at several learning rates to tune it, then over seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One setting of one method on one task; every cell of an experiment draws and trains on as many completions.

    updates_per_rollout: how stale the completions are; members: k; completions: in one update; updates: of the run.
    """

    experiment: str
    task: str
    objective: str = "gvpo"
    beta: float = 0.1
    updates_per_rollout: int = 1
    members: int = 8
    completions: int = 32
    updates: int = 160
    reference: str = "rollout"

    @property
    def groups_per_update(self) -> int:
        """Whole groups in one update."""
        return self.completions // self.members

    def run(self, learning_rate: float, seed: int) -> Run:
        """One run of this cell."""
        return Run(self, learning_rate, seed)


@dataclass(frozen=True)
class Run:
    """A cell at one learning rate and seed: a row of the results."""

    cell: Cell
    learning_rate: float
    seed: int

    def key(self) -> dict[str, Any]:
        """What names the run in the results, with the settings that make it repeatable."""
        return {**asdict(self.cell), "learning_rate": self.learning_rate, "seed": self.seed}

    def settings(self) -> dict[str, Any]:
        """What the run's GVPOConfig holds, whatever the task."""
        cell = self.cell
        same = ("objective", "beta", "reference", "updates_per_rollout", "groups_per_update")
        return {name: getattr(cell, name) for name in same} | {
            "num_generations": cell.members,
            "max_steps": cell.updates,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "disable_tqdm": True,
        }


@dataclass(frozen=True)
class Protocol:
    """How the cells of a task are tuned and repeated: every cell has the same effort."""

    learning_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]


_ENUMERABLE = Protocol((3e-4, 1e-3, 3e-3), (100, 101, 102), tuple(range(5)))
_LANGUAGE = Protocol((1e-5, 3e-5, 1e-4), (100,), tuple(range(5)))
PROTOCOLS = {"graded": _ENUMERABLE, "rare": _ENUMERABLE, "family": _LANGUAGE, "sums": _LANGUAGE}
"""By task. Tuning seeds are not among those that are reported."""

BETA = {"grpo": 0.0, "dr_grpo": 0.0, "rloo": 0.0, "reinforce": 0.0, "gvpo": 0.1, "dpo": 0.1}
"""By objective, where beta is not what is compared: policy gradients without a KL term, as TRL's GRPO by default."""

COMPARED = ("gvpo", "dr_grpo", "grpo", "rloo", "reinforce", "dpo")


def staleness(task: str) -> list[Cell]:
    """On-policy, and 4, 8, 16 updates from one rollout."""
    return [
        Cell("staleness", task, objective, BETA[objective], updates_per_rollout)
        for updates_per_rollout, objective in product((1, 4, 8, 16), COMPARED)
    ]


def beta(task: str) -> list[Cell]:
    """GVPO's one knob. With one update per rollout beta only scales the gradient, and Adam undoes that."""
    return [
        Cell("beta", task, beta=beta, updates_per_rollout=updates_per_rollout)
        for updates_per_rollout, beta in product((1, 8), (0.01, 0.03, 0.1, 0.3, 1.0))
    ]


def members(task: str) -> list[Cell]:
    """k at equal total completions, on-policy and stale."""
    return [
        Cell("members", task, objective, BETA[objective], updates_per_rollout, members=k)
        for objective, updates_per_rollout, k in product(("gvpo", "dr_grpo"), (1, 4), (2, 4, 8, 16, 32))
    ]


def ablations(task: str) -> list[Cell]:
    """GVPO without its covariance, its variance, or both."""
    return [
        Cell("ablations", task, objective, updates_per_rollout=updates_per_rollout)
        for updates_per_rollout, objective in product((1, 4), ("gvpo", "gvpo_no_cov", "gvpo_no_var", "gvpo_no_cov_var"))
    ]


def anchored(task: str) -> list[Cell]:
    """A fixed reference: does the method end at pi_ref exp(R/beta)/Z, and how near?"""
    compared = ("gvpo", "kimi_pmd", "reinforce", "rloo", "grpo", "dr_grpo", "ipo", "dpo")
    return [
        Cell("anchored", task, objective, 0.3, updates_per_rollout, reference="initial")
        for updates_per_rollout, objective in product((1, 8), compared)
    ]


def language(task: str) -> list[Cell]:
    """The comparison that is owed on a real model: on-policy, and eight updates from one rollout."""
    return [
        Cell("language", task, objective, BETA[objective], stale, completions=64, updates=16)
        for stale, objective in product((1, 8), ("gvpo", "dr_grpo", "grpo"))
    ]


EXPERIMENTS = {
    "language": language,
    "staleness": staleness,
    "beta": beta,
    "members": members,
    "ablations": ablations,
    "anchored": anchored,
}


def cells_of(experiment: str, task: str) -> list[Cell]:
    """The cells of an experiment on a task."""
    return EXPERIMENTS[experiment](task)
