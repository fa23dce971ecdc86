"""Prompts to groups: a row's own completions, or what the sources bring for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.encoding import completed
from gvpo.sources.dataset import Row
from gvpo.sources.source import Source, fill_one_by_one


def fill_groups(
    rows: Sequence[Row],
    sources: Sequence[Source],
    k: int,
    seeds: Sequence[int],
    tokenizer: Any | None,
    ready: Callable[[Row, Group], None] | None = None,
) -> list[Group]:
    """One group per row, in order, with token ids and texts; sources are asked for rows without completions.

    The sources bring members in turn, each as many as are still wanting of k at most. seeds: one per row.
    tokenizer: None where everything has token ids; there are no texts then. ready: told of every group as soon as it is
    whole, which may be while others are drawn.
    Raises UserError for a row that no source had a completion for.
    """
    groups: list[Group | None] = [None] * len(rows)

    def finish(place: int, members: list[Completion]) -> None:
        row = rows[place]
        groups[place] = group = completed(row.group() if row.offline else _group(row, members), tokenizer)
        if ready is not None:
            ready(row, group)

    for place, row in enumerate(rows):
        if row.offline:
            finish(place, [])
    places = [place for place, row in enumerate(rows) if not row.offline]
    empty, theirs = [rows[place] for place in places], [seeds[place] for place in places]
    members: list[list[Completion]] = [[] for _ in empty]
    for source in sources if empty else []:
        wanted = [k - len(already) for already in members]

        def drawn(n: int, more: list[Completion], whole: bool = source is sources[-1]) -> None:
            members[n] += more
            if whole:
                finish(places[n], members[n])

        fill_one_by_one(source, empty, wanted, theirs, drawn)
    for place, mine in zip(places, members, strict=True):
        if groups[place] is None:
            finish(place, mine)
    return [group for group in groups if group is not None]


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
