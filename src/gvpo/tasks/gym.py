"""reasoning-gym's procedural tasks as problems (github open-thought/reasoning-gym).

Covered: tasks whose entries have an answer and keep their meaning as JSON: 98 of the 106 of version 0.1.25. Not
covered: boxnet, graph_color, propositional_logic, rubiks_cube and rush_hour (many answers are right, none is given),
arc_agi and rearc (their scorer tells tuples from lists), composite (needs settings). An entry with an empty answer is
refused, not skipped; `ab` has one in about a hundred.
"""

from __future__ import annotations

import json
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.tasks.problems import Problem

DEFAULT_SIZE = 500


def gym_problems(name: str, limit: int | None = None) -> list[Problem]:
    """The problems of "gym:NAME[:SIZE[:SEED]]", 500 and seed 0 by default; limit: only the first so many.

    Columns: `gym_task`, the NAME, and `gym_entry`, all that reasoning-gym's own scorer needs, as JSON has it.
    Raises UserError for a name or number that is none, without the package, and for a task that is not covered.
    """
    task, size, seed = _parsed(name)
    dataset = _dataset(name, task, size, seed)
    problems = [_problem(name, task, i, dataset[i]) for i in range(min(size, limit or size))]
    _check_entry(name, dataset, dataset[0], problems[0].columns["gym_entry"])
    return problems


def _parsed(name: str) -> tuple[str, int, int]:
    _, task, *numbers = name.split(":")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise UserError(f"task {name!r}: not of the form gym:NAME[:SIZE[:SEED]], as in gym:leg_counting:500:0")
    size, seed = [*map(int, numbers), *(DEFAULT_SIZE, 0)[len(numbers) :]]
    if size < 1:
        raise UserError(f"task {name!r}: a SIZE of {size}; give 1 or more")
    return task, size, seed


def _dataset(name: str, task: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"task {name!r} needs reasoning-gym: pip install 'gvpo[tasks]'") from error
    if task not in DATASETS:
        raise UserError(f"task {name!r}: reasoning-gym has no {task!r}; {nearest(task, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed)
    except AssertionError as error:
        raise UserError(f"task {name!r}: needs settings that cannot be given here ({error}); take another") from error


def _problem(name: str, task: str, i: int, entry: dict[str, Any]) -> Problem:
    where, answer = f"{name}, entry {i}", entry["answer"]
    if answer is None:
        raise UserError(f"{where}: reasoning-gym gives no answer, as many would be right; take another task")
    if not str(answer).strip():
        raise UserError(f"{where}: its answer is empty; take another task, SIZE or SEED")
    copy = json.loads(json.dumps(entry, default=str))
    return Problem(entry["question"], [str(answer)], f"{name}/{i}", where, {"gym_task": task, "gym_entry": copy})


def _check_entry(name: str, dataset: Any, entry: dict[str, Any], copy: dict[str, Any]) -> None:
    """The first entry's answer must be worth as much with the JSON copy as with the entry itself."""
    answer = entry["answer"]
    if dataset.score_answer(answer, copy) != dataset.score_answer(answer, entry):
        raise UserError(f"task {name!r}: its entries lose their meaning as JSON; take another task")
