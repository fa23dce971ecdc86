"""The known tasks and suites, and the problems of a task: from the hub, a file, or reasoning-gym."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.group_files import numbered_rows
from gvpo.hub import check_hub
from gvpo.tasks.problems import Problem, read_problem

FILES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Task:
    """A known set of problems.

    hub: "owner/name" of the dataset there. config: its configuration, None for its only one. problem, answer: its
    columns. size: how many problems there are. samples: completions per problem in an evaluation, by default.
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
    "math": Task("DigitalLearningGmbH/MATH-lighteval", "default", "train", "problem", "solution", 7500),
    "math-test": Task("DigitalLearningGmbH/MATH-lighteval", "default", "test", "problem", "solution", 5000),
    "math500": Task("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", 500),
    "aime24": Task("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", 30, samples=32),
    "amc": Task("AI-MO/aimo-validation-amc", None, "train", "problem", "answer", 83),
    "minerva": Task("math-ai/minervamath", None, "test", "question", "answer", 272),
    "olympiadbench": Task("knoveleng/OlympiadBench", None, "train", "question", "answer", 675),
}

SUITES: dict[str, tuple[str, ...]] = {"math": ("aime24", "amc", "math500", "minerva", "olympiadbench")}


def load_problems(name: str, *, data_dir: str | Path | None = None, limit: int | None = None) -> list[Problem]:
    """The problems of a task, in its order.

    name: a key of TASKS, read from data_dir/NAME.jsonl (or .parquet) where data_dir is given, else from the hub; or a
    .jsonl or .parquet file; or "gym:NAME[:SIZE[:SEED]]", a reasoning-gym task. limit: only the first so many.
    Raises UserError, one line, naming file, line (from 1) and field; also where a known task has not its known size,
    for then its results could be compared with no others.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give 1 or more, or leave it out for all")
    if name.startswith("gym:"):
        from gvpo.tasks.gym import gym_problems

        return gym_problems(name, limit)
    if name in TASKS:
        return _known(name, data_dir, limit)
    if files := task_files(name, data_dir):
        return _from_file(files[0].stem, files[0], limit)
    raise UserError(
        f"task {name!r}: neither a known task, nor a .jsonl or .parquet file, nor gym:NAME; {nearest(name, TASKS)}"
    )


def task_labels(names: Sequence[str]) -> list[str]:
    """What each task is called in a run, whose files have it in their names: of a file its name without extension.

    Raises UserError for two that are called the same: their problems would have the same ids.
    """
    labels: list[str] = []
    for name in names:
        is_file = Path(name).suffix.lower() in FILES
        label = Path(name).stem if is_file else name.replace(":", "-").replace("/", "-")
        if label in labels:
            raise UserError(f"--task {name}: another task is called {label!r} too; give each once, or rename a file")
        labels.append(label)
    return labels


def task_files(name: str, data_dir: str | Path | None) -> list[Path]:
    """The files that a task may be read from, the first that is there; none for the hub and reasoning-gym."""
    if name in TASKS:
        return [] if data_dir is None else [Path(data_dir) / f"{name}{suffix}" for suffix in FILES]
    return [Path(name)] if Path(name).suffix.lower() in FILES else []


def _known(name: str, data_dir: str | Path | None, limit: int | None) -> list[Problem]:
    task = TASKS[name]
    if data_dir is None:
        source, problems = task.hub, _from_hub(name, task)
    else:
        paths = task_files(name, data_dir)
        path = next((path for path in paths if path.exists()), paths[0])
        source, problems = str(path), _from_file(name, path)
    if len(problems) != task.size:
        raise UserError(
            f"{source}: {len(problems)} problems, and {name} has {task.size}, so this is another set; give the right "
            "one, or a file as the task's name for a set of your own"
        )
    return problems[:limit]


def _from_file(name: str, path: Path, limit: int | None = None) -> list[Problem]:
    rows = itertools.islice(numbered_rows(path), limit)
    problems = [read_problem(row, where, f"{name}/{i}") for i, (where, row) in enumerate(rows)]
    if not problems:
        raise UserError(f"{path}: no rows; give at least one problem")
    return problems


def _from_hub(name: str, task: Task) -> list[Problem]:
    return [
        read_problem(row, f"{task.hub}:{task.split}, row {i + 1}", f"{name}/{i}", (task.problem,), (task.answer,))
        for i, row in enumerate(_hub_rows(name, task))
    ]


def _hub_rows(name: str, task: Task) -> Iterable[Any]:
    advice = f"put the problems in FOLDER/{name}.jsonl and give FOLDER as data_dir"
    check_hub("dataset", task.hub, advice)
    from datasets import load_dataset

    try:
        return load_dataset(task.hub, task.config, split=task.split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"task {name!r}: {task.hub} could not be loaded from the hub ({reason}); {advice}") from error
