"""The known tasks and suites, and the problems of a task: from the hub, a file, or reasoning-gym."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.group_files import numbered_rows
from gvpo.hub import check_hub
from gvpo.tasks.problems import Problem, read_problem


@dataclass(frozen=True, slots=True)
class Task:
    """A known set of problems.

    hub: "owner/name". config: the dataset's configuration, None for its only one. problem, answer: its columns.
    size: how many problems it has. samples: completions per problem in an evaluation, by default.
    """

    hub: str
    config: str | None
    split: str
    problem: str
    answer: str
    size: int
    samples: int = 1


TASKS: dict[str, Task] = {
    "gsm8k": Task("openai/gsm8k", "main", "test", "question", "answer", 1319),
    "gsm8k-train": Task("openai/gsm8k", "main", "train", "question", "answer", 7473),
    "math": Task("DigitalLearningGmbH/MATH-lighteval", None, "train", "problem", "solution", 7500),
    "math-test": Task("DigitalLearningGmbH/MATH-lighteval", None, "test", "problem", "solution", 5000),
    "math500": Task("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", 500),
    "aime24": Task("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", 30, samples=32),
    "amc": Task("AI-MO/aimo-validation-amc", None, "train", "problem", "answer", 83),
    "minerva": Task("math-ai/minervamath", None, "test", "question", "answer", 272),
    "olympiadbench": Task("math-ai/olympiadbench", None, "test", "question", "final_answer", 675),
}

SUITES: dict[str, tuple[str, ...]] = {"math": ("aime24", "amc", "math500", "minerva", "olympiadbench")}

Numbered = Iterator[tuple[str, Any]]
"""Rows, each after where it is."""


def load_problems(name: str, *, data_dir: str | Path | None = None, limit: int | None = None) -> list[Problem]:
    """The problems of a task, in its order.

    name: a key of TASKS, read from data_dir/NAME.jsonl where data_dir is given, else from the hub; or a .jsonl or
    .parquet file; or "gym:NAME[:SIZE[:SEED]]", a reasoning-gym task. limit: only the first so many, at least 1.
    Raises UserError, one line, naming file, line (from 1) and field.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give 1 or more, or leave it out for all")
    if name.startswith("gym:"):
        from gvpo.tasks.gym import gym_problems

        return gym_problems(name, limit)
    if name in TASKS:
        return _task_problems(name, data_dir, limit)
    if name.endswith((".jsonl", ".parquet")):
        return _problems(Path(name).stem, numbered_rows(name), name, limit)
    raise UserError(f"task {name!r}: neither a known task nor a .jsonl or .parquet file; {nearest(name, TASKS)}")


def _task_problems(name: str, data_dir: str | Path | None, limit: int | None) -> list[Problem]:
    task = TASKS[name]
    if data_dir is None:
        return _problems(name, _hub_rows(name, task), task.hub, limit)
    path = Path(data_dir) / f"{name}.jsonl"
    return _problems(name, numbered_rows(path), str(path), limit)


def _problems(name: str, rows: Numbered, source: str, limit: int | None) -> list[Problem]:
    some = itertools.islice(rows, limit)
    problems = [read_problem(row, where, f"{name}/{number}") for number, (where, row) in enumerate(some)]
    if not problems:
        raise UserError(f"{source}: no rows; give at least one problem")
    return problems


def _hub_rows(name: str, task: Task) -> Numbered:
    from datasets import load_dataset

    check_hub("dataset", task.hub, f"put the problems in FOLDER/{name}.jsonl and give FOLDER as data_dir")
    dataset = load_dataset(task.hub, task.config, split=task.split)
    return ((f"{task.hub} {task.split}, row {number}", row) for number, row in enumerate(dataset, start=1))
