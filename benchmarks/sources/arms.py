"""What is compared: where the members of a group come from, on two tasks; everything else is the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo.cli.demo import FULL_MARKS, brevity, make_task

sys.path.append(str(Path(__file__).parent.parent / "learning"))
import language

PROMPTS, HELD_OUT = 32, 100
"""Few enough that every prompt comes again: history needs one."""

POLICY = {"type": "policy"}
SHOWN = {"type": "demonstration", "column": "demonstration"}


@dataclass(frozen=True)
class Arm:
    """Sources as in a config, and settings that differ from the others'."""

    sources: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "on-policy": Arm([POLICY]),
    "history 2:6": Arm([POLICY, {"type": "replay", "members": 2}]),
    "history 4:4": Arm([POLICY, {"type": "replay", "members": 4}]),
    "4 epochs per rollout": Arm([POLICY], {"epochs_per_rollout": 4}),
    "demonstrations 1:7": Arm([POLICY, SHOWN]),
    "2 epochs per rollout": Arm([POLICY], {"epochs_per_rollout": 2}),
    "demonstrations 1:3, k = 4": Arm([POLICY, SHOWN], {"num_generations": 4}),
    "on-policy, k = 4": Arm([POLICY], {"num_generations": 4}),
}
"""In the order in which they are run; groups of 8 for 8 prompts an update, but where k is named. The last two were
added when the others had been seen."""


@dataclass(frozen=True)
class Task:
    """train, held_out: rows; rewards, weights: their functions; accuracy: the metric of an evaluation that counts."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    rewards: list[Any]
    weights: list[float] | None
    accuracy: str
    settings: dict[str, Any]


def task(name: str, seed: int) -> Task:
    """The demo's task (another draw of numbers for each seed), or reasoning-gym's family relationships."""
    if name == "demo":
        train, held_out = make_task(seed, PROMPTS)
        return Task(
            [{**row, "demonstration": row["answer"]} for row in train],
            held_out[:HELD_OUT],
            [FULL_MARKS, brevity],
            [0.8, 0.2],
            f"eval/rewards/{FULL_MARKS}/mean",
            {"learning_rate": 1e-5, "max_completion_length": 10},
        )
    train, held_out = language.rows("family")
    # The prompt ends within the assistant's turn: the answer goes on after a space, as a drawn one does.
    train = [{**row, "demonstration": f" {row['entry']['answer']}"} for row in train]
    first = seed * PROMPTS
    return Task(
        train[first : first + PROMPTS],
        held_out[:HELD_OUT],
        [language.exact],
        None,
        "eval/reward",
        {"learning_rate": 3e-5, "max_completion_length": language.LONGEST},
    )
