"""`gvpo score`: rewards for the groups of files, in place; what samplers append meanwhile is kept.

Covered: .jsonl and .parquet files of any size, a few groups in memory at a time; the same reward functions, called the
same way and under the same limits as in training, but that `trainer_state` is None.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gvpo.cli.options import checked_config, config_default, config_option, reward_functions
from gvpo.cli.progress import progress_bar
from gvpo.errors import UserError, located
from gvpo.training.config import ConfigError, GVPOConfig, parse_value

if TYPE_CHECKING:
    from gvpo.groups import Group
    from gvpo.rewards import RewardFunction

TOGETHER = 64
"""Groups that the reward functions get in one call."""

NAMED = 3


def score(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Files of groups, .jsonl or .parquet; a folder is all its .jsonl files."
        ),
    ],
    reward: Annotated[
        list[str],
        typer.Option(
            "--reward",
            metavar="NAME",
            help="module:function, found from the working directory, or a ready-made one, such as exact_match or "
            "math_accuracy. May be given again: rewards are summed.",
        ),
    ],
    reward_weights: Annotated[
        str | None,
        typer.Option("--reward_weights", metavar="[A,B,...]", help="One weight per --reward.  [default: all 1]"),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Score anew the groups that have rewards.")] = False,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write the groups of one FILE here; it stays as it is."),
    ] = None,
    reward_workers: Annotated[int | None, config_option("reward_workers", "INT")] = config_default("reward_workers"),
    reward_timeout: Annotated[float, config_option("reward_timeout", "SECONDS")] = config_default("reward_timeout"),
    reward_memory: Annotated[float, config_option("reward_memory", "GIB")] = config_default("reward_memory"),
) -> None:
    """Add rewards to the groups that have none.

    A file is replaced when all of it is scored, or not at all; samplers may go on appending to it meanwhile. One
    reward in a group is enough for it to be left alone.
    """
    from gvpo.rewards.calling import check_signatures

    limits = checked_config(
        reward_workers=reward_workers, reward_timeout=reward_timeout, reward_memory=reward_memory
    ).reward_limits
    functions = reward_functions(reward, limits)
    weights = _weights(reward_weights, len(functions))
    paths = _paths(files)
    if out is not None and (len(paths) != 1 or Path(files[0]).is_dir()):
        raise UserError("--out: takes the groups of one file; name one, or leave --out away to score in place")
    surveys = [_survey(path, again) for path in paths]
    columns = list(dict.fromkeys(name for survey in surveys for name in survey.columns))
    check_signatures(functions, columns)
    tally = _Tally(had=sum(survey.groups - survey.open for survey in surveys))
    with progress_bar("groups", sum(survey.open for survey in surveys)) as show:
        for survey in surveys:
            job = _Job(survey.path, functions, weights, columns, again, tally, show)
            _score_file(survey, job, out)
    print(f"{out or ', '.join(files)}: {tally}")


@dataclass
class _Survey:
    """A file's groups, how many of them are to be scored, and their columns."""

    path: Path
    groups: int = 0
    open: int = 0
    columns: list[str] = field(default_factory=list)


@dataclass
class _Tally:
    """scored, had, late: groups that got rewards, had some, came meanwhile. total: of the rewards given, to so many
    members. without: names of groups with no reward for any member. failed: completions that a reward function gave no
    answer for, by cause."""

    had: int
    scored: int = 0
    total: float = 0.0
    members: int = 0
    without: list[str] = field(default_factory=list)
    late: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        line = f"{self.scored} group{'s' * (self.scored != 1)} scored, {self.had} had rewards"
        if not self.scored:
            line += "; --again scores them anew"
        if self.members:
            line += f"; mean reward {self.total / self.members:.4g}"
        if self.without:
            more = f" and {len(self.without) - NAMED} more" if len(self.without) > NAMED else ""
            line += f"; no reward for any completion of {len(self.without)}: {', '.join(self.without[:NAMED])}{more}"
        if self.failed:
            causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.failed.items()))
            line += f"; no answer for {self.failed.total()} completions ({causes}), see reward_failures in their meta"
        if self.late:
            line += f"; {self.late} came meanwhile and have none yet, the same command scores them"
        return line


@dataclass(frozen=True)
class _Job:
    """How the groups of a file are scored, and where that is counted."""

    path: Path
    functions: Sequence[RewardFunction]
    weights: Sequence[float] | None
    columns: Sequence[str]
    again: bool
    tally: _Tally
    show: Callable[[int, str], None]

    def scored(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The groups with rewards, in order; those that had some as they are."""
        numbered = enumerate(groups, 1)
        while chunk := list(itertools.islice(numbered, TOGETHER)):
            asked = {number: group for number, group in chunk if _is_open(group, self.again)}
            if asked:
                self._score(asked)
            yield from (group for _, group in chunk)

    def _score(self, groups: dict[int, Group]) -> None:
        from gvpo.rewards.fill import FAILURES, failures_by_cause, fill_rewards

        for group in groups.values():
            for member in group.completions:
                member.reward = None
                for name in ("rewards", "extra", FAILURES):
                    member.meta.pop(name, None)
        with located(f"{self.path}, groups {min(groups)} to {max(groups)}"):
            fill_rewards(list(groups.values()), self.functions, self.weights, columns=self.columns)
        tally = self.tally
        tally.failed += failures_by_cause(groups.values())
        for number, group in groups.items():
            given = [reward for reward in group.rewards if reward is not None]
            tally.total += math.fsum(given)
            tally.members += len(given)
            if not given:
                tally.without.append(f"{self.path}, group {number}")
        tally.scored += len(groups)
        self.show(tally.scored, str(self.path))


def _score_file(survey: _Survey, job: _Job, out: str | None) -> None:
    from gvpo.group_files import read_groups, rewrite_groups, write_groups

    if out is not None:
        write_groups(job.scored(read_groups(survey.path)), out)
    elif survey.open:
        job.tally.late += rewrite_groups(survey.path, job.scored)


def _survey(path: Path, again: bool) -> _Survey:
    """Read the whole file once, so that what is wrong with it is told before a reward is paid for."""
    from gvpo.group_files import read_groups

    survey, columns = _Survey(path), dict[str, None]()
    for group in read_groups(path):
        survey.groups += 1
        survey.open += _is_open(group, again)
        columns |= dict.fromkeys(group.columns)
    survey.columns = list(columns)
    return survey


def _is_open(group: Group, again: bool) -> bool:
    return again or all(reward is None for reward in group.rewards)


def _paths(files: Sequence[str]) -> list[Path]:
    paths: dict[Path, Path] = {}
    for file in map(Path, files):
        inside = sorted(path for path in file.glob("*.jsonl") if not path.name.startswith("."))
        if file.is_dir() and not inside:
            raise UserError(f"{file}: no .jsonl files in it; name a folder that gvpo sample wrote, or a file")
        for path in inside if file.is_dir() else [file]:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def _weights(text: str | None, count: int) -> list[float] | None:
    if text is None:
        return None
    try:
        weights = GVPOConfig(reward_weights=parse_value(text)).reward_weights
    except ConfigError as error:
        raise UserError(f"--{error.field}: {error.problem}") from error
    if weights is not None and len(weights) != count:
        raise UserError(f"--reward_weights: {len(weights)} weights for {count} of --reward; give one each")
    return weights
