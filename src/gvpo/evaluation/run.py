"""From problems to scored completions in a file, batch by batch; what was stopped goes on.

What a problem gets is a function of the settings, its id and the batch that it is drawn in: a batch that was stopped is
drawn again whole, and what is missing of it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo.errors import UserError
from gvpo.evaluation.votes import Equal, number_votes
from gvpo.group_files import append_groups, locked_file, read_groups
from gvpo.groups import Completion, Group
from gvpo.models.encoding import completed
from gvpo.rewards.fill import fill_rewards
from gvpo.rewards.resolve import RewardFunction
from gvpo.sources.dataset import Row
from gvpo.sources.policy import draw_seed
from gvpo.sources.source import Source

UNCOMPARED = "uncompared"
"""In the meta of a problem's first completion: how many comparisons of its answers, for the votes, failed."""


@dataclass(frozen=True)
class Drawer:
    """What draws and scores a task's completions.

    tokenizer: None where completions come as texts. columns: what rows of the task may have. equal: tells which answers
    are the same, for the votes.
    """

    source: Source
    tokenizer: Any | None
    functions: Sequence[RewardFunction]
    columns: Collection[str]
    equal: Equal
    num_samples: int
    seed: int

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        """The rows' groups, scored, each completion with its `answer` and, where there are several, its `vote`."""
        seeds = [problem_seed(self.seed, row.id or "") for row in rows]
        members = self.source.fill(rows, [self.num_samples] * len(rows), seeds)
        groups = [row.group(drawn) for row, drawn in zip(rows, members, strict=True)]
        if self.tokenizer is not None:
            groups = [completed(group, self.tokenizer) for group in groups]
        fill_rewards(groups, self.functions, None, columns=self.columns)
        _note_answers(groups, self.equal)
        return groups


def evaluate_task(rows: Sequence[Row], path: Path, drawer: Drawer, batch: int, go_on: Callable[[int], bool]) -> bool:
    """Draw, score and write what is missing of a task, in order; whether all of it is there.

    path: the task's file. go_on: called with the groups that are there, before each batch and at the end; False stops.
    Raises UserError as source, rewards and files do; what was written stays.
    """
    there = groups_there(path, rows)
    first = there - there % batch if there < len(rows) else there
    for start in range(first, len(rows), batch):
        if not go_on(there):
            return False
        groups = drawer.groups(rows[start : start + batch])
        append_groups(groups[there - start :], path)
        there = start + len(groups)
    go_on(there)
    return True


def groups_there(path: Path, rows: Sequence[Row]) -> int:
    """How many of the rows, from the first on, have their groups in the file; a line that a kill has torn is cut off.

    Raises UserError for a file that holds anything else.
    """
    if not path.exists() or not _cut_torn_line(path):
        return 0
    number = 0
    for number, group in enumerate(read_groups(path), start=1):
        if number > len(rows) or group.id != rows[number - 1].id:
            wanted = rows[number - 1].id if number <= len(rows) else "none"
            raise UserError(f"{path}, group {number}: of problem {group.id}, expected {wanted}; give another --out")
    return number


def problem_seed(seed: int, name: str) -> int:
    """The seed of a problem's draws: the same in whatever suite and order it comes."""
    return draw_seed(seed, int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()))


def is_right(completion: Completion) -> bool:
    """Whether a completion counts as right: its reward is 1 or more. One without a verdict does not."""
    return completion.reward is not None and completion.reward >= 1.0


def _note_answers(groups: Sequence[Group], equal: Equal) -> None:
    from gvpo.rewards.equivalence import extract_answer

    for group in groups:
        for one in group.completions:
            one.meta["answer"] = extract_answer(one.text or "")
    several = [group for group in groups if group.k > 1]
    answers = [[one.meta["answer"] for one in group.completions] for group in several]
    right = [[is_right(one) for one in group.completions] for group in several]
    for group, votes, failed in zip(several, *number_votes(answers, right, equal), strict=True):
        for one, vote in zip(group.completions, votes, strict=True):
            one.meta["vote"] = vote
        if failed:
            group.completions[0].meta[UNCOMPARED] = failed


def _cut_torn_line(path: Path) -> int:
    """Bytes left once what follows the last line end is gone."""
    with locked_file(path, "rb+") as file:
        kept = file.read().rfind(b"\n") + 1
        file.truncate(kept)
    return kept
