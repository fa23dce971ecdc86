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
    """Rows scored in one forward. whole: every group in it is complete here, so that its loss can be taken here.

    end_to_end: the rows are laid behind one another as one, without padding; else one below the other.
    """

    rows: list[PlannedRow]
    whole: bool
    end_to_end: bool = False

    @property
    def positions(self) -> int:
        """Token positions of the forward, padding included."""
        return _positions(self.rows, self.end_to_end)

    @property
    def packed(self) -> bool:
        """Whether what is read together must not all see one another."""
        return self.end_to_end or any(len(row.members) > 1 for row in self.rows)

    @property
    def members(self) -> list[tuple[int, int]]:
        """(group, member) of every completion scored here, in the order of the scores."""
        return [(row.group, member) for row in self.rows for member in row.members]


def plan_batches(
    groups: Sequence[EncodedGroup], token_budget: int | None, share_prefix: bool, end_to_end: bool = False
) -> list[Batch]:
    """Batches that hold every member once, none with more than token_budget positions (None: one batch).

    share_prefix: a row is a group, its prompt once; otherwise a row is one prompt with one completion.
    end_to_end: see Batch.
    Raises UserError if one prompt with one completion exceeds the budget.
    """
    if token_budget is None:
        rows = [row for index, group in enumerate(groups) for row in _rows(index, group, None, share_prefix)]
        return [Batch(rows, True, end_to_end)] if rows else []
    # The longest first: groups of one length together pad the least, and short ones fill what long ones leave.
    planned = sorted((_rows(*item, token_budget, share_prefix) for item in enumerate(groups)), key=_width, reverse=True)
    whole: list[list[PlannedRow]] = []
    parts: list[list[PlannedRow]] = []
    for rows in planned:
        # Padding depends on what is together; without it, any batch with room will do.
        open_batches = whole if end_to_end else whole[-1:]
        if _positions(rows, end_to_end) > token_budget:
            parts += _split(rows, token_budget, end_to_end)
        elif fitting := next((b for b in open_batches if _positions([*b, *rows], end_to_end) <= token_budget), None):
            fitting += rows
        else:
            whole.append(rows)
    return [Batch(rows, False, end_to_end) for rows in parts] + [Batch(rows, True, end_to_end) for rows in whole]


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


def _positions(rows: list[PlannedRow], end_to_end: bool) -> int:
    return sum(row.length for row in rows) if end_to_end else len(rows) * _width(rows)


def _split(rows: list[PlannedRow], token_budget: int, end_to_end: bool) -> list[list[PlannedRow]]:
    parts: list[list[PlannedRow]] = [[]]
    for row in rows:
        if parts[-1] and _positions([*parts[-1], row], end_to_end) > token_budget:
            parts.append([])
        parts[-1].append(row)
    return parts


@dataclass(frozen=True, slots=True)
class Segments:
    """Whose token stands where.

    group_BL: number of a prompt with its completions within the batch. member_BL: 0 for a token of the prompt, m for
    one of its m-th completion, -1 for padding.
    """

    group_BL: Tensor
    member_BL: Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as tensors: B rows of L positions, M scored tokens of N members.

    input_ids_BL, position_ids_BL; segments: None where a row is one prompt with one completion. sources_M: flat
    position (row * L + column) of the hidden state that predicts the token; targets_M: the token; members_M: which of
    the batch's N members it belongs to; places_M: its place among that completion's tokens.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    segments: Segments | None
    sources_M: Tensor
    targets_M: Tensor
    members_M: Tensor
    places_M: Tensor


def build_inputs(groups: Sequence[EncodedGroup], batch: Batch, device: torch.device) -> Inputs:
    """The tensors of a batch. Padding stands on the right, where no causal model sees it from a real token."""
    packed = [_pack(groups[row.group], row.members) for row in batch.rows]
    lines = [packed] if batch.end_to_end else [[row] for row in packed]
    width = max(sum(len(row.ids) for row in line) for line in lines)
    # Padding is placed no further than a real token: beyond the last learned position there is no embedding.
    furthest = max(max(row.positions) for row in packed)
    ids, positions, owners, segments, sources, targets, members, places = [], [], [], [], [], [], [], []
    scored = number = 0
    for line in lines:
        for row in line:
            sources += [len(ids) + source for source in row.sources]
            ids += row.ids
            positions += row.positions
            owners += [number] * len(row.ids)
            segments += row.segments
            targets += row.targets
            members += [scored + member for member in row.members]
            places += row.places
            scored += len(batch.rows[number].members)
            number += 1
        padding = -len(ids) % width
        ids += [0] * padding
        positions += [min(column, furthest) for column in range(width - padding, width)]
        owners += [number - 1] * padding
        segments += [-1] * padding

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def rows_of(values: list[int]) -> Tensor:
        return tensor(values).view(len(lines), width)

    return Inputs(
        rows_of(ids),
        rows_of(positions),
        Segments(rows_of(owners), rows_of(segments)) if batch.packed else None,
        *map(tensor, (sources, targets, members, places)),
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
