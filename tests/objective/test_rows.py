"""Slopes over whole groups, from rows that lie anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.objective import Rows, gvpo_loss, row_slopes

BETA = 0.3


def make_table(sizes, seed=0, dead=()):
    """Rows of groups of these sizes in an order of their own; ratios of several nats."""
    numbers = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.full((size,), 10 + number) for number, size in enumerate(sizes)])
    order = torch.randperm(len(groups), generator=numbers)
    rewards = torch.rand(len(groups), dtype=torch.float64, generator=numbers)
    ratios = 3 * torch.randn(len(groups), dtype=torch.float64, generator=numbers)
    refs = -50 + 20 * torch.rand(len(groups), dtype=torch.float64, generator=numbers)
    live = torch.ones(len(groups), dtype=torch.bool)
    live[list(dead)] = False
    return Rows(groups[order], torch.arange(len(groups)), rewards, refs, live), ratios


def reference(table, ratios):
    """The gradient of the objective itself, whole groups of live rows."""
    logps = (table.refs_N + ratios).requires_grad_()
    live = table.live_N
    loss = gvpo_loss(logps[live], table.refs_N[live], table.rewards_N[live], table.groups_N[live], beta=BETA)
    loss.backward()
    return logps.grad, float(loss.detach())


@pytest.mark.parametrize("dead", [(), (0, 5)])
def test_a_mini_batch_of_whole_groups_has_the_objectives_gradient_and_loss(dead):
    table, ratios = make_table([4, 3, 1, 2], dead=dead)
    gradient, loss = reference(table, ratios)

    slopes, metrics = row_slopes(table, torch.ones(10, dtype=torch.bool), ratios, BETA)

    torch.testing.assert_close(slopes, gradient, rtol=1e-12, atol=1e-14)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert metrics["split_groups"] == 0


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_split_groups_add_up(sizes, seed, parts):
    """However rows fall into mini-batches: parts weighted by their numbers of groups are the whole."""
    table, ratios = make_table(sizes, seed)
    part_of = torch.randint(parts, (len(ratios),), generator=torch.Generator().manual_seed(seed))
    gradient, _ = reference(table, ratios)
    teaching = sum(size >= 2 for size in sizes)

    found = [row_slopes(table, part_of == part, ratios, BETA) for part in range(parts)]

    total = sum(slopes * metrics["groups"] for slopes, metrics in found)
    torch.testing.assert_close(total, gradient * teaching, rtol=1e-10, atol=1e-12)
    assert sum(metrics["groups"] for _, metrics in found) == pytest.approx(teaching)


def test_ratios_of_other_groups_are_not_looked_at():
    table, ratios = make_table([3, 3])
    rows = table.groups_N == 10
    clean, _ = row_slopes(table, rows, ratios, BETA)
    ratios[~rows] = torch.nan
    assert torch.equal(row_slopes(table, rows, ratios, BETA)[0], clean)


def test_rows_of_one_session_are_one_completion():
    """Two rows whose log-probs add up to a member's give the slope of that member, both of them."""
    whole, ratios = make_table([3])
    columns = (whole.groups_N, whole.members_N, whole.rewards_N, whole.refs_N, whole.live_N)
    split = Rows(*(torch.cat([one, one[:1]]) for one in columns))
    parts = torch.cat([ratios, torch.tensor([1.5])])
    parts[0] -= 1.5
    split.refs_N[0], split.refs_N[3] = whole.refs_N[0] + 7, -7
    one, of_one = row_slopes(whole, torch.ones(3, dtype=torch.bool), ratios, BETA)
    two, of_two = row_slopes(split, torch.ones(4, dtype=torch.bool), parts, BETA)
    torch.testing.assert_close(two, torch.cat([one, one[:1]]))
    assert of_two == pytest.approx(of_one)

    split.rewards_N[3] += 1
    with pytest.raises(ValueError, match="different rewards"):
        row_slopes(split, torch.ones(4, dtype=torch.bool), parts, BETA)


@pytest.mark.parametrize("here", [True, False])
def test_a_mini_batch_without_a_group_of_two_teaches_nothing(here):
    table, ratios = make_table([1, 1])
    slopes, metrics = row_slopes(table, torch.full((2,), here), ratios, BETA)
    assert slopes.tolist() == [0, 0]
    assert metrics == {"loss": 0, "groups": 0, "split_groups": 0}


@pytest.mark.parametrize(
    ("column", "message"),
    [(2, "reward is not finite: nan"), (3, "reference log-prob is not"), (None, "log-ratio is not")],
)
def test_what_is_not_finite_is_an_error(column, message):
    """Never a slope of NaN, which an optimizer skips or spreads."""
    rows, ratios = make_table([3])
    values = ratios if column is None else (rows.groups_N, rows.members_N, rows.rewards_N, rows.refs_N)[column]
    values[1] = torch.nan
    with pytest.raises(ValueError, match=message):
        row_slopes(rows, torch.ones(3, dtype=torch.bool), ratios, BETA)
