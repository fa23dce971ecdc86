"""Which sequences go through the model together: batches of token positions within a budget.

A batch never decides what a gradient is. Groups are kept whole where they fit; where one does not, its members are
spread over several batches, and the caller scores before it back-propagates (training/update.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gvpo.errors import UserError
from gvpo.models.encoding import EncodedGroup


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of a batch: the prompt of a group, then one of its completions, or several packed behind it."""

    group: int
    members: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows scored in one forward. whole: every group in it is complete here, so that its loss can be taken here."""

    rows: list[PlannedRow]
    whole: bool

    @property
    def positions(self) -> int:
        """Token positions of the forward, padding included."""
        return len(self.rows) * _width(self.rows)

    @property
    def packed(self) -> bool:
        """Whether some row holds several completions."""
        return any(len(row.members) > 1 for row in self.rows)

    @property
    def members(self) -> list[tuple[int, int]]:
        """(group, member) of every completion scored here, in the order of the scores."""
        return [(row.group, member) for row in self.rows for member in row.members]


def plan_batches(groups: Sequence[EncodedGroup], token_budget: int | None, share_prefix: bool) -> list[Batch]:
    """Batches that hold every member once, none with more than token_budget positions (None: one batch).

    share_prefix: a row is a group, its prompt once; otherwise a row is one prompt with one completion.
    Raises UserError if one prompt with one completion exceeds the budget.
    """
    if token_budget is None:
        rows = [row for index, group in enumerate(groups) for row in _rows(index, group, None, share_prefix)]
        return [Batch(rows, whole=True)] if rows else []
    # Groups of one length together pad the least.
    planned = sorted((_rows(*item, token_budget, share_prefix) for item in enumerate(groups)), key=_width, reverse=True)
    batches: list[Batch] = []
    open_rows: list[PlannedRow] = []
    for rows in planned:
        if _fits([*open_rows, *rows], token_budget):
            open_rows += rows
            continue
        if open_rows:
            batches.append(Batch(open_rows, whole=True))
        open_rows = rows
        if not _fits(rows, token_budget):
            batches += [Batch(part, whole=False) for part in _split(rows, token_budget)]
            open_rows = []
    return [*batches, Batch(open_rows, whole=True)] if open_rows else batches


def _rows(index: int, group: EncodedGroup, token_budget: int | None, share_prefix: bool) -> list[PlannedRow]:
    lengths = [group.length(member) for member in range(len(group.completion_ids))]
    if token_budget is not None and max(lengths) > token_budget:
        raise UserError(
            f"group {index}, member {lengths.index(max(lengths))}: prompt and completion are {max(lengths)} tokens, "
            f"more than token_budget={token_budget}; raise token_budget, or leave it None"
        )
    if not share_prefix:
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return [PlannedRow(index, [member], lengths[member]) for member in order]
    prompt = len(group.prompt_ids)
    rows: list[PlannedRow] = []
    members, length = [], prompt
    for member, own in enumerate(lengths):
        if members and token_budget is not None and length + own - prompt > token_budget:
            rows.append(PlannedRow(index, members, length))
            members, length = [], prompt
        members.append(member)
        length += own - prompt
    return [*rows, PlannedRow(index, members, length)]


def _width(rows: list[PlannedRow]) -> int:
    return max(row.length for row in rows)


def _fits(rows: list[PlannedRow], token_budget: int) -> bool:
    return len(rows) * _width(rows) <= token_budget


def _split(rows: list[PlannedRow], token_budget: int) -> list[list[PlannedRow]]:
    parts: list[list[PlannedRow]] = [[]]
    for row in rows:
        if parts[-1] and not _fits([*parts[-1], row], token_budget):
            parts.append([])
        parts[-1].append(row)
    return parts


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as tensors: B rows of L positions, M scored tokens of N members.

    input_ids_BL, position_ids_BL; segments_BL: 0 for a token of the row's prompt, m for one of its m-th completion, -1
    for padding; None where no row holds several completions. sources_M: flat position (row * L + column) of the hidden
    state that predicts the token; targets_M: the token; members_M: which of the batch's N members it belongs to;
    places_M: its place among that completion's tokens.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    segments_BL: Tensor | None
    sources_M: Tensor
    targets_M: Tensor
    members_M: Tensor
    places_M: Tensor


def build_inputs(groups: Sequence[EncodedGroup], batch: Batch, device: torch.device) -> Inputs:
    """The tensors of a batch. Padding stands on the right, where no causal model sees it from a real token."""
    packed = [_pack(groups[row.group], row.members) for row in batch.rows]
    width = max(len(row.ids) for row in packed)
    # Padding is placed no further than a real token: beyond the last learned position there is no embedding.
    furthest = max(max(row.positions) for row in packed)
    ids, positions, sources, targets, members, places = [], [], [], [], [], []
    scored = 0
    for number, (row, planned) in enumerate(zip(packed, batch.rows, strict=True)):
        padding = range(len(row.ids), width)
        ids.append(row.ids + [0] * len(padding))
        positions.append(row.positions + [min(column, furthest) for column in padding])
        sources += [number * width + source for source in row.sources]
        targets += row.targets
        members += [scored + member for member in row.members]
        places += row.places
        scored += len(planned.members)

    def tensor(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    segments = [row.segments + [-1] * (width - len(row.segments)) for row in packed]
    return Inputs(
        tensor(ids),
        tensor(positions),
        tensor(segments) if batch.packed else None,
        tensor(sources),
        tensor(targets),
        tensor(members),
        tensor(places),
    )


@dataclass(frozen=True, slots=True)
class _PackedRow:
    ids: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int]
    targets: list[int]
    members: list[int]
    places: list[int]


def _pack(group: EncodedGroup, members: Sequence[int]) -> _PackedRow:
    prompt = len(group.prompt_ids)
    row = _PackedRow(list(group.prompt_ids), list(range(prompt)), [0] * prompt, [], [], [], [])
    for number, member in enumerate(members):
        completion, scored = group.completion_ids[member], group.scored[member]
        start = len(row.ids)
        for place, token in enumerate(completion):
            if scored is None or scored[place]:
                row.sources.append(prompt - 1 if place == 0 else start + place - 1)
                row.targets.append(token)
                row.members.append(number)
                row.places.append(place)
        # The last token is predicted, never read.
        row.ids.extend(completion[:-1])
        row.positions.extend(range(prompt, prompt + len(completion) - 1))
        row.segments.extend([number + 1] * (len(completion) - 1))
    return row
