"""An order of rows in which mini-batches hold whole groups. The standard library alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

Partition = Callable[[Sequence[float], int], Sequence[Sequence[int]]]


def group_order(
    groups: Sequence[str], loads: Sequence[float], mini_batches: int, ranks: int, partition: Partition
) -> list[int]:
    """An order of rows in which mini-batches hold whole groups: rank r's k-th slice is its part of mini-batch k.

    groups: each row's group; their number is a multiple of mini_batches * ranks. loads: each row's cost. partition:
    (loads, parts) -> the places of each part, all of one size. A group that no mini-batch has room for is split.
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    batches: list[list[int]] = [[] for _ in range(mini_batches)]
    to_do = [0.0] * mini_batches

    def put(some: list[int]) -> bool:
        """Into the mini-batch with the least to do among those with room."""
        room = [at for at, batch in enumerate(batches) if len(batch) + len(some) <= len(groups) // mini_batches]
        if room:
            at = min(room, key=to_do.__getitem__)
            batches[at] += some
            to_do[at] += sum(loads[row] for row in some)
        return bool(room)

    for group in sorted(rows.values(), key=lambda group: (-len(group), -sum(loads[row] for row in group))):
        if not put(group):
            one_by_one = [put([row]) for row in group]
            assert all(one_by_one)
    of_ranks: list[list[int]] = [[] for _ in range(ranks)]
    for batch in batches:
        for rank, places in enumerate(partition([loads[row] for row in batch], ranks)):
            of_ranks[rank] += [batch[place] for place in places]
    return [row for rows in of_ranks for row in rows]
