"""Prompts to groups: a row's own completions, or draws from a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo.groups import Group
from gvpo.models.encoding import completed
from gvpo.sources.dataset import Row
from gvpo.sources.policy import Source


def fill_groups(rows: Sequence[Row], source: Source, seeds: Sequence[int], tokenizer: Any | None) -> list[Group]:
    """One group per row, in order, with token ids and texts; `source` draws for rows that bring no completions.

    seeds: one per row. tokenizer: None where everything has token ids; there are no texts then.
    """
    empty = [place for place, row in enumerate(rows) if not row.offline]
    drawn = source.fill([rows[place] for place in empty], [seeds[place] for place in empty]) if empty else []
    by_place = dict(zip(empty, drawn, strict=True))
    groups = [by_place[place] if place in by_place else row.group() for place, row in enumerate(rows)]
    return [completed(group, tokenizer) for group in groups]
