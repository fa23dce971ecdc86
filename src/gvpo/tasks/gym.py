"""reasoning-gym's procedural tasks as problems."""

from __future__ import annotations

from typing import Any

from gvpo.errors import UserError
from gvpo.tasks.problems import Problem

DEFAULT_SIZE = 500


def gym_problems(name: str, limit: int | None = None) -> list[Problem]:
    """The problems of "gym:NAME[:SIZE[:SEED]]", with the columns `gym_task` (the name) and `gym_entry` (all of it)."""
    task, size, seed = _parsed(name)
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"task {name!r} needs reasoning-gym: pip install 'gvpo[tasks]'") from error
    dataset: Any = reasoning_gym.create_dataset(task, size=size, seed=seed)
    entries = [dataset[i] for i in range(min(size, limit or size))]
    return [
        Problem(
            entry["question"],
            [str(entry["answer"])],
            f"{name}/{i}",
            f"{name}, entry {i}",
            {"gym_task": task, "gym_entry": entry},
        )
        for i, entry in enumerate(entries)
    ]


def _parsed(name: str) -> tuple[str, int, int]:
    _, task, *numbers = name.split(":")
    size, seed = [*map(int, numbers), *(DEFAULT_SIZE, 0)[len(numbers) :]]
    return task, size, seed
