"""Prompts to groups: a row's own completions, or what the sources bring for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.encoding import completed
from gvpo.sources.dataset import Row
from gvpo.sources.source import Source


def fill_groups(
    rows: Sequence[Row], sources: Sequence[Source], k: int, seeds: Sequence[int], tokenizer: Any | None
) -> list[Group]:
    """One group per row, in order, with token ids and texts; sources are asked for rows without completions.

    The sources bring members in turn, each as many as are still wanting of k at most. seeds: one per row.
    tokenizer: None where everything has token ids; there are no texts then.
    Raises UserError for a row that no source had a completion for.
    """
    empty = [row for row in rows if not row.offline]
    theirs = [seed for row, seed in zip(rows, seeds, strict=True) if not row.offline]
    members: list[list[Completion]] = [[] for _ in empty]
    for source in sources if empty else []:
        wanted = [k - len(already) for already in members]
        for already, more in zip(members, source.fill(empty, wanted, theirs), strict=True):
            already += more
    filled = iter(members)
    return [completed(row.group() if row.offline else _group(row, next(filled)), tokenizer) for row in rows]


def _group(row: Row, members: list[Completion]) -> Group:
    if not members:
        raise UserError(f"{row.where}: no source has a completion for this row; add {{type: policy}} to sources")
    return row.group(members)


def unrewarded(rows: Sequence[Row], groups: Sequence[Group]) -> list[Group]:
    """What reward functions are to score: these groups with only those members that have no reward, not copied.

    A row's own rewards win over functions: its group is left out where it brings one reward or more.
    """
    asked = []
    for row, group in zip(rows, groups, strict=True):
        members = [] if row.has_rewards else [one for one in group.completions if one.reward is None]
        if members:
            asked.append(Group(group.prompt, members, prompt_ids=group.prompt_ids, id=group.id, columns=group.columns))
    return asked
