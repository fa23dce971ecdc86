"""Batch plans, whatever the groups and the budget; and what a batch holds as tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.errors import UserError
from gvpo.models.batches import Batch, PlannedRow, build_inputs, plan_batches
from gvpo.models.encoding import EncodedGroup

CPU = torch.device("cpu")


def group(prompt: int, *completions: int, start: int = 0) -> EncodedGroup:
    """Token ids counted up from start, so that each is known by its place."""
    ids, end = [], start + prompt
    for count in completions:
        ids.append(list(range(end, end + count)))
        end += count
    return EncodedGroup(list(range(start, start + prompt)), ids, [None] * len(completions))


groups_of_any_shape = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=5)).map(lambda g: group(g[0], *g[1])),
    max_size=6,
)


def real_width(batch: Batch, groups: list[EncodedGroup]) -> int:
    return build_inputs(groups, batch, CPU).input_ids_BL.shape[1]


class TestPlan:
    @given(groups=groups_of_any_shape, spare=st.integers(0, 60), share_prefix=st.booleans(), limited=st.booleans())
    @settings(max_examples=150, deadline=None)
    def test_any_plan(self, groups: list[EncodedGroup], spare: int, share_prefix: bool, limited: bool) -> None:
        members = [(g, m) for g, one in enumerate(groups) for m in range(len(one.completion_ids))]
        longest = max((groups[g].length(m) for g, m in members), default=0)
        budget = longest + spare if limited else None
        plan = plan_batches(groups, budget, share_prefix)

        assert sorted(member for batch in plan for member in batch.members) == members
        for batch in plan:
            if budget is not None:
                assert batch.positions <= budget
            assert real_width(batch, groups) <= max(row.length for row in batch.rows)
            # What is called whole is: no member of its groups is elsewhere.
            inside = {g for g, _ in batch.members}
            assert batch.whole == all((member in batch.members) for member in members if member[0] in inside)
            if not share_prefix:
                assert all(len(row.members) == 1 for row in batch.rows)
        if not limited:
            assert len(plan) == bool(groups)
        if share_prefix and budget is None:
            assert all(len(row.members) == len(groups[row.group].completion_ids) for b in plan for row in b.rows)

    def test_a_group_that_fits_is_never_split(self) -> None:
        groups = [group(2, 3, 3), group(2, 1, 1), group(2, 9, 9)]
        plan = plan_batches(groups, 2 * 11, share_prefix=False)
        assert [batch.whole for batch in plan] == [True, True]
        assert [sorted({g for g, _ in batch.members}) for batch in plan] == [[2], [0, 1]]

    def test_a_group_that_does_not_fit_is_split_alone(self) -> None:
        groups = [group(2, 3, 3), group(2, 9, 9)]
        plan = plan_batches(groups, 2 * 11 - 1, share_prefix=False)
        assert [(batch.members, batch.whole) for batch in plan] == [
            ([(1, 0)], False),
            ([(1, 1)], False),
            ([(0, 0), (0, 1)], True),
        ]

    def test_a_shared_prompt_counts_once(self) -> None:
        (one,) = groups = [group(10, 2, 2, 2)]
        assert plan_batches(groups, 16, share_prefix=True) == [Batch([PlannedRow(0, [0, 1, 2], 16)], whole=True)]
        assert [batch.whole for batch in plan_batches(groups, 16, share_prefix=False)] == [False] * 3
        assert [row.members for batch in plan_batches(groups, 15, True) for row in batch.rows] == [[0, 1], [2]]
        assert one.length(0) == 12

    def test_groups_of_like_length_go_together(self) -> None:
        groups = [group(1, 1, 1), group(1, 19, 19), group(1, 1, 1), group(1, 19, 19)]
        plan = plan_batches(groups, 80, share_prefix=False)
        assert [sorted({g for g, _ in batch.members}) for batch in plan] == [[1, 3], [0, 2]]

    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_a_budget_that_holds_not_one_member(self, share_prefix: bool) -> None:
        groups = [group(2, 3), group(3, 1, 5, 2)]
        assert plan_batches(groups, 8, share_prefix)
        with pytest.raises(UserError, match=r"^group 1, member 1: .* 8 tokens, more than token_budget=7; raise"):
            plan_batches(groups, 7, share_prefix)


class TestInputs:
    def test_one_row_a_completion(self) -> None:
        groups = [group(2, 3, 1)]  # prompt 0 1, completions 2 3 4 and 5
        (batch,) = plan_batches(groups, None, share_prefix=False)
        inputs = build_inputs(groups, batch, CPU)
        assert inputs.input_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
        assert inputs.position_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
        assert inputs.segments is None
        # 2 is predicted at 1, 3 at 2, 4 at 3; 5 at place 1 of the second row of 4.
        assert inputs.sources_M.tolist() == [1, 2, 3, 5]
        assert inputs.targets_M.tolist() == [2, 3, 4, 5]
        assert inputs.members_M.tolist() == [0, 0, 0, 1]

    def test_a_group_in_one_row(self) -> None:
        groups = [group(2, 3, 2), group(1, 1, start=10)]
        (batch,) = plan_batches(groups, None, share_prefix=True)
        inputs = build_inputs(groups, batch, CPU)
        # 0 1 | 2 3 (4) | 5 (6), then 10 | (11) and padding.
        assert inputs.input_ids_BL.tolist() == [[0, 1, 2, 3, 5], [10, 0, 0, 0, 0]]
        assert inputs.position_ids_BL.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 3]]
        assert inputs.sources_M.tolist() == [1, 2, 3, 1, 4, 5]
        assert inputs.targets_M.tolist() == [2, 3, 4, 5, 6, 11]
        assert inputs.members_M.tolist() == [0, 0, 0, 1, 1, 2]
        assert inputs.segments is not None
        assert inputs.segments.group_BL.tolist() == [[0] * 5, [1] * 5]
        assert inputs.segments.member_BL.tolist() == [[0, 0, 1, 1, 2], [0, -1, -1, -1, -1]]

    def test_groups_end_to_end(self) -> None:
        groups = [group(2, 3, 2), group(1, 2, start=10)]
        (batch,) = plan_batches(groups, None, True, end_to_end=True)
        assert batch.positions == 2 + 3 + 2 + 1 + 2 and batch.packed
        inputs = build_inputs(groups, batch, CPU)
        # 0 1 | 2 3 (4) | 5 (6), then 10 | 11 (12): nothing between, and positions begin anew.
        assert inputs.input_ids_BL.tolist() == [[0, 1, 2, 3, 5, 10, 11]]
        assert inputs.position_ids_BL.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
        assert inputs.sources_M.tolist() == [1, 2, 3, 1, 4, 5, 6]
        assert inputs.targets_M.tolist() == [2, 3, 4, 5, 6, 11, 12]
        assert inputs.members_M.tolist() == [0, 0, 0, 1, 1, 2, 2]
        assert inputs.segments is not None
        assert inputs.segments.group_BL.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
        assert inputs.segments.member_BL.tolist() == [[0, 0, 1, 1, 2, 0, 1]]

    def test_without_padding_short_groups_fill_what_long_ones_leave(self) -> None:
        # Lengths 9, 8, 3, 2 within 12: 9 + 3 and 8 + 2. Below one another 3 would be padded to 9, and 2 to 8.
        groups = [group(1, length - 1) for length in (3, 9, 2, 8)]
        plan = plan_batches(groups, 12, True, end_to_end=True)
        assert [[row.length for row in batch.rows] for batch in plan] == [[9, 3], [8, 2]]
        assert [[row.length for row in batch.rows] for batch in plan_batches(groups, 12, True)] == [[9], [8], [3, 2]]

    def test_padding_has_no_position_of_its_own_beyond_the_furthest(self) -> None:
        groups = [group(4, 3, 3, 3), group(1, 2, 2)]
        (batch,) = plan_batches(groups, None, share_prefix=True)
        assert int(build_inputs(groups, batch, CPU).position_ids_BL.max()) == 5

    def test_masked_tokens_are_read_and_not_scored(self) -> None:
        groups = [EncodedGroup([7], [[1, 2, 3]], [[False, True, False]])]
        (batch,) = plan_batches(groups, None, share_prefix=False)
        inputs = build_inputs(groups, batch, CPU)
        assert inputs.input_ids_BL.tolist() == [[7, 1, 2]]
        assert (inputs.sources_M.tolist(), inputs.targets_M.tolist()) == ([1], [2])

    def test_nothing_scored_is_still_a_batch(self) -> None:
        groups = [EncodedGroup([7], [[], []], [None, None])]
        for share_prefix in (True, False):
            (batch,) = plan_batches(groups, None, share_prefix)
            inputs = build_inputs(groups, batch, CPU)
            assert inputs.sources_M.dtype == torch.long
            assert len(inputs.sources_M) == 0
