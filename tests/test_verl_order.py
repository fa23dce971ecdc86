"""Orders of rows in which mini-batches hold whole groups; verl is not needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.integrations.order import group_order


def halves(loads, parts):
    size = len(loads) // parts
    return [range(part * size, (part + 1) * size) for part in range(parts)]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    mini_batches=st.integers(1, 4),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_order_is_a_permutation_with_equal_ranks(sizes, mini_batches, ranks, seed):
    names = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    names += [f"pad{number}" for number in range(-len(names) % (mini_batches * ranks))]
    order = group_order(names, [1.0] * len(names), mini_batches, ranks, halves)
    assert sorted(order) == list(range(len(names)))


@pytest.mark.parametrize(("groups", "k", "mini_batches", "ranks"), [(16, 4, 4, 2), (64, 8, 4, 8), (6, 3, 3, 1)])
def test_groups_of_one_size_stay_whole(groups, k, mini_batches, ranks):
    names = [f"g{number}" for number in range(groups)] * k  # in the order of completion
    order = group_order(names, [float(row) for row in range(len(names))], mini_batches, ranks, halves)
    share = len(names) // mini_batches // ranks
    for batch in range(mini_batches):
        rows = [
            row
            for rank in range(ranks)
            for row in order[rank * share * mini_batches :][batch * share : (batch + 1) * share]
        ]
        held = [names[row] for row in rows]
        assert all(held.count(name) == k for name in held)
