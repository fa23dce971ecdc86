"""What a model is evaluated on: the tasks that were asked for, their problems as rows, and how each is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gvpo.errors import UserError, located, nearest
from gvpo.evaluation.run import UNCOMPARED
from gvpo.group_files import numbered_rows
from gvpo.groups import Completion, Group, group_from_dict
from gvpo.rewards.fill import FAILURES
from gvpo.sampling.sampler import SamplingParams
from gvpo.sources.dataset import Row
from gvpo.tasks import SUITES, TASKS, Problem, load_problems, prompt_rows, task_labels
from gvpo.tasks.problems import PROBLEM_COLUMNS

SEVERAL_TEMPERATURE, SEVERAL_TOP_P = 0.6, 0.95
"""How several completions are drawn where nothing else is said: as DeepSeek-R1 was evaluated (its model card)."""


@dataclass(frozen=True)
class EvalTask:
    """A task as it is evaluated: its problems, k, how they are drawn, and the reward function that judges them.

    name: of its file in a run's folder too.
    """

    name: str
    problems: list[Problem]
    num_samples: int
    params: SamplingParams
    reward: str

    def rows(self, template: str) -> list[Row]:
        """The problems as prompts."""
        return [
            Row(columns.pop("prompt"), None, columns, (), problem.where, problem.id)
            for problem, columns in zip(self.problems, prompt_rows(self.problems, template), strict=True)
        ]

    def settings(self, *, drawn: bool = True) -> dict[str, Any]:
        """What tells this evaluation of the task from another one; drawn: whether completions are."""
        asked = [[one.id, one.text, one.answers, one.columns] for one in self.problems]
        how = {"temperature": self.params.temperature, "top_p": self.params.top_p} if drawn else {}
        return {
            "problems": len(asked),
            "digest": digest(asked),
            "num_samples": self.num_samples,
            **how,
            "reward": self.reward,
        }


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn; None = the task's own, or what suits the number of samples."""

    max_completion_length: int
    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0

    def of(self, task: str) -> tuple[int, SamplingParams]:
        """k and the sampling of a task: greedy for one completion, else at temperature 0.6 and top-p 0.95.

        Raises UserError for numbers out of range, and for several completions at temperature 0, which are all alike.
        """
        known = TASKS.get(task)
        k = self.num_samples or (known.samples if known else 1)
        temperature = (SEVERAL_TEMPERATURE if k > 1 else 0.0) if self.temperature is None else self.temperature
        top_p = (SEVERAL_TOP_P if k > 1 else 1.0) if self.top_p is None else self.top_p
        if k > 1 and temperature == 0:
            raise UserError(
                f"temperature 0 draws the same completion {k} times for {task!r}; give a temperature above 0, or -k 1"
            )
        return k, SamplingParams(self.max_completion_length, temperature, top_p, self.top_k)


def task_names(suites: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The tasks of the suites, then the others, each once. Raises UserError for none, and for an unknown suite."""
    for suite in suites:
        if suite not in SUITES:
            raise UserError(f"--suite {suite!r}: no such suite; {nearest(suite, SUITES)}")
    names = list(dict.fromkeys([*(task for suite in suites for task in SUITES[suite]), *tasks]))
    if not names:
        raise UserError(f"nothing to evaluate on; give --suite {next(iter(SUITES))}, or --task NAME or FILE.jsonl")
    return names


def default_reward(task: str) -> str:
    """Who judges a task where nobody else is named."""
    return "reasoning_gym_score" if task.startswith("gym:") else "math_accuracy"


def load_tasks(
    names: Sequence[str], data_dir: str | None, limit: int | None, drawing: Drawing, reward: str | None = None
) -> list[EvalTask]:
    """The tasks with their problems. Raises UserError as `load_problems`, `task_labels` and `Drawing.of` do."""
    labels, drawn = task_labels(names), [drawing.of(name) for name in names]
    return [
        EvalTask(label, load_problems(name, data_dir=data_dir, limit=limit), *how, reward or default_reward(name))
        for name, label, how in zip(names, labels, drawn, strict=True)
    ]


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


# Completions that are there already


@dataclass
class GivenSource:
    """Completions from a file, by the problem's id."""

    completions: Mapping[str | None, list[Completion]]

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """The first wanted[i] of row i."""
        return [self.completions[row.id][:count] for row, count in zip(rows, wanted, strict=True)]


def given_completions(file: str, tasks: Sequence[EvalTask]) -> tuple[GivenSource, list[EvalTask]]:
    """The completions in a file of one row a problem, in order, and the tasks with as many samples as these.

    A row has `completions`, texts or whole completions as groups have them, or one text, `completion`.
    Raises UserError for another number of rows than of problems, or different numbers of completions in a task.
    """
    rows = list(numbered_rows(file))
    given = [(where, _given(where, row)) for where, row in rows]
    problems = sum(len(task.problems) for task in tasks)
    if len(given) != problems:
        names = ", ".join(f"{task.name} {len(task.problems)}" for task in tasks)
        raise UserError(
            f"{file}: {len(given)} rows for {problems} problems ({names}); give one row a problem, in order"
        )
    for (where, row), problem in zip(rows, (one for task in tasks for one in task.problems), strict=True):
        _check_problem(where, row, problem)
    counted, by_id, rest = [], {}, iter(given)
    for task in tasks:
        own = [next(rest) for _ in task.problems]
        k = len(own[0][1])
        for where, completions in own:
            if len(completions) != k:
                raise UserError(
                    f"{where}: {len(completions)} completions, and {own[0][0]} has {k}; give all of a task equally many"
                )
        counted.append(replace(task, num_samples=k))
        by_id |= {problem.id: completions for problem, (_, completions) in zip(task.problems, own, strict=True)}
    return GivenSource(by_id), counted


def _check_problem(where: str, row: Mapping[str, Any], problem: Problem) -> None:
    """Refuse completions of another problem, where the row says which one they are of."""
    columns = row.get("columns")
    told = columns if isinstance(columns, Mapping) else row
    for name in PROBLEM_COLUMNS:
        text = told.get(name)
        if isinstance(text, str) and text.strip() != problem.text.strip():
            raise UserError(
                f"{where}, field {name!r}: {text!r:.60}, and the task has {problem.text!r:.60} in this place "
                f"({problem.where}); give one row a problem, in the task's order"
            )


def _given(where: str, row: Any) -> list[Completion]:
    with located(where):
        if isinstance(row, Mapping) and isinstance(row.get("completion"), str):
            if row.get("completions") is not None:
                raise UserError("both 'completion' and 'completions'; give one of them")
            row = {"completions": [row["completion"]]}
        if not isinstance(row, Mapping) or row.get("completions") is None:
            raise UserError("no completions; give 'completions', a list of texts, or one text as 'completion'")
        group: Group = group_from_dict({"prompt": "", "completions": row["completions"]})
    scored = ("answer", "vote", UNCOMPARED, "rewards", "extra", FAILURES)  # of an earlier scoring
    return [
        replace(one, reward=None, meta={name: value for name, value in one.meta.items() if name not in scored})
        for one in group.completions
    ]
