"""Two runs on the same problems, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from gvpo.errors import UserError
from gvpo.evaluation import estimators, paired
from gvpo.evaluation.folder import SETTINGS, read_json
from gvpo.evaluation.results import right_counts
from gvpo.group_files import read_groups
from gvpo.groups import Group

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Run:
    """A finished evaluation: its folder, settings, and each task's groups."""

    folder: Path
    settings: dict[str, Any]
    groups: dict[str, list[Group]]


@dataclass(frozen=True)
class Pairs:
    """Two runs on a task: of each problem's k completions those that are right, in A and in B."""

    k: int
    right_a_P: list[int]
    right_b_P: list[int]

    @property
    def differences_P(self) -> list[int]:
        """A's less B's."""
        return [one - other for one, other in zip(self.right_a_P, self.right_b_P, strict=True)]

    @property
    def completions(self) -> int:
        """Of each run."""
        return self.k * len(self.right_a_P)

    def resampled(self, place: int) -> np.ndarray:
        """Means of resampled differences; place: the task's, whose seed it is."""
        return estimators.resampled_means([d / self.k for d in self.differences_P], [BOOTSTRAP_SEED, place])


def read_run(folder: str) -> Run:
    """The run in a folder. Raises UserError for one that is no finished evaluation."""
    path = Path(folder)
    if not (path / SETTINGS).is_file():
        raise UserError(f"{folder}: no {SETTINGS} in it; give a folder that gvpo eval wrote")
    settings = read_json(path / SETTINGS)
    tasks = settings.get("tasks")
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise UserError(f"{path / SETTINGS}, field 'tasks': expected an object of tasks; was it changed by hand?")
    groups = {}
    for name, task in tasks.items():
        file = path / f"{name}.jsonl"
        groups[name] = list(read_groups(file)) if file.exists() and file.stat().st_size else []
        if len(groups[name]) != task.get("problems"):
            raise UserError(
                f"{folder}: {name} has {len(groups[name])} of {task.get('problems')} problems; the gvpo eval command "
                "that began it goes on with the others"
            )
    return Run(path, settings, groups)


def compare_runs(a: Run, b: Run) -> dict[str, Any]:
    """What A has right less what B has right, for each task, with an interval and an exact p-value.

    The average is over tasks, each with the same weight; its interval is None where one of theirs is.
    Raises UserError where the problems differ, naming the first that does, or the completions per problem.
    """
    for one, other in ((a, b), (b, a)):
        for name in one.groups:
            if name not in other.groups:
                raise UserError(f"{other.folder}: has no task {name}, which {one.folder} has; compare runs on the same")
    for name in a.groups:
        _check_same(name, a, b)
    pairs = [Pairs(some[0].k, right_counts(some), right_counts(b.groups[name])) for name, some in a.groups.items()]
    tasks = [compare_task(each, place) for place, each in enumerate(pairs)]
    average: dict[str, Any] = {what: fmean(task[what] for task in tasks) for what in ("a", "b", "difference")}
    has_interval = all(task["interval"] for task in tasks)
    means = np.mean([each.resampled(place) for place, each in enumerate(pairs)], axis=0)
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "differing_settings": _differing(a.settings, b.settings),
        "tasks": dict(zip(a.groups, tasks, strict=True)),
        "average": average | {"interval": _bounds(means) if has_interval else None},
    }


def compare_task(pairs: Pairs, place: int = 0) -> dict[str, Any]:
    """Two runs on one task. place: the task's among others, for the bootstrap's seed.

    difference: A less B in pass@1, with its paired bootstrap interval over problems, None where all problems differ
    alike. won, lost: problems of which A has more, or fewer, right. least: the smallest difference with p < 0.05, the
    problems' differences being as large as they are; None where no difference would do; least_right: in completions.
    """
    differences = pairs.differences_P
    least = paired.smallest_significant(differences)
    return {
        "problems": len(differences),
        "num_samples": pairs.k,
        "a": sum(pairs.right_a_P) / pairs.completions,
        "b": sum(pairs.right_b_P) / pairs.completions,
        "difference": sum(differences) / pairs.completions,
        "interval": _bounds(pairs.resampled(place)) if len(set(differences)) > 1 else None,
        "p": paired.sign_flip(differences),
        "won": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
        "least": None if least is None else least / pairs.completions,
        "least_right": least,
    }


def _bounds(means: np.ndarray) -> dict[str, float]:
    low, high = estimators.percentiles(means)
    return {"low": low, "high": high}


def _check_same(name: str, a: Run, b: Run) -> None:
    one, other = a.groups[name], b.groups[name]
    for number, (mine, yours) in enumerate(zip(one, other, strict=False)):
        for what in ("problem", "answers"):
            if mine.columns.get(what) != yours.columns.get(what):
                raise UserError(
                    f"{name}, problem {number} (from 0): {a.folder} and {b.folder} differ in {what!r} "
                    f"({mine.columns.get(what)!r:.40} and {yours.columns.get(what)!r:.40}); evaluate both on the same"
                )
    if len(one) != len(other):
        shorter, longer = sorted((a, b), key=lambda run: len(run.groups[name]))
        first = longer.groups[name][len(shorter.groups[name])].id
        raise UserError(
            f"{name}: {shorter.folder} has {len(shorter.groups[name])} problems and {longer.folder} "
            f"{len(longer.groups[name])}, the first more is {first}; evaluate both on the same (--limit)"
        )
    if one[0].k != other[0].k:
        raise UserError(
            f"{name}: {one[0].k} completions a problem in {a.folder} and {other[0].k} in {b.folder}; evaluate both "
            "with the same -k"
        )


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], within: str = "") -> dict[str, list[Any]]:
    """The settings that differ, by dotted name, and both values."""
    differing: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            differing |= _differing(one, other, f"{within}{name}.")
        elif one != other:
            differing[within + name] = [one, other]
    return differing
