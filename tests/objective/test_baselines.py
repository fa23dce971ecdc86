"""The objectives against plain loops over their papers' formulas, on hard groups and numbers; their refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from paper_formulas import (
    LONGEST,
    PAIRED,
    PLAIN,
    SEEDS,
    TOKENS,
    Batch,
    close,
    every,
    on_tokens,
    plain,
    stale_batch,
)

from gvpo.objective import OBJECTIVES


def test_every_objective_has_a_formula_here() -> None:
    assert PLAIN.keys() == OBJECTIVES.keys()


@every
def test_value_and_gradient_are_the_papers(name: str) -> None:
    for seed in SEEDS:
        batch = stale_batch(seed)
        loss, gradient = plain(name, batch)
        assert close(batch.loss(name), loss), seed
        assert close(batch.gradient(name), gradient), seed


@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if one.takes_zero_beta])
def test_without_a_kl_term(name: str) -> None:
    for seed in SEEDS:
        batch = stale_batch(seed, beta=0.0)
        loss, gradient = plain(name, batch)
        assert close(batch.loss(name), loss) and close(batch.gradient(name), gradient), seed
        elsewhere = replace(batch, refs=batch.refs + torch.linspace(-9, 9, batch.refs.numel()).view_as(batch.refs))
        assert torch.equal(elsewhere.gradient(name), batch.gradient(name))


def test_the_batches_hold_what_is_hard() -> None:
    batches = [stale_batch(seed) for seed in SEEDS]
    gaps = torch.cat([(one.summed(one.logps) - one.summed(one.refs)).abs() for one in batches])
    assert gaps.median() > 2 and gaps.max() > 10
    counts = [torch.stack([one.ids == label for label in one.ids]).sum(0) for one in batches]
    assert any((k == 1).any() for k in counts) and any(len(set(k.tolist())) > 2 for k in counts)
    assert any((~one.mask).all(1).any() for one in batches)  # completions without tokens
    assert any(one.ids[0] == one.ids[2] != one.ids[1] for one in batches if len(one.ids) > 2)  # interleaved
    tied = [len(set(one.rewards[group].tolist())) < len(group) for one in batches for group in one.groups()]
    assert any(tied) and not all(tied)
    clipped_tokens = {
        (bool(ratio > 0), bool(one.rewards[i] > one.rewards[group].mean()))
        for one in batches
        for group in one.groups()
        for i in group
        for ratio in (one.logps - one.old)[i][one.mask[i]]
        if abs(ratio) > 0.3
    }
    assert len(clipped_tokens) == 4  # both ways, for the better and for the worse


# --- By hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "loss", "slopes"),
    [  # Rewards 1 and 0: advantages 1/2 and -1/2 in Dr. GRPO, 1 and -1 in RLOO.
        ((1.0, 1.0), 0.0, (-1.0, 1.0)),
        ((2.0, 1.0), -0.2, (0.0, 1.0)),  # the better one is likely enough: 1.2 - 1
        ((0.5, 1.0), 0.5, (-0.5, 1.0)),  # but has been lost: counts in full
        ((1.0, 0.5), -0.2, (-1.0, 0.0)),  # the worse one is unlikely enough: 1 - 0.8
        ((1.0, 2.0), 1.0, (-1.0, 2.0)),  # but has been found: counts in full
    ],
)
def test_what_is_clipped_by_hand(ratios: tuple[float, float], loss: float, slopes: tuple[float, float]) -> None:
    old = torch.tensor([[-3.0], [-1.0]], dtype=torch.float64)
    logps = old + torch.tensor(ratios, dtype=torch.float64).log()[:, None]
    ids, mask = torch.tensor([4, 4]), torch.ones(2, 1, dtype=torch.bool)
    batch = Batch(logps, old, old, mask, torch.tensor([1.0, 0.0]), ids, 0.0)
    assert close(batch.loss("rloo"), loss / 2)
    assert close(batch.gradient("rloo"), torch.tensor(slopes, dtype=torch.float64)[:, None] / 2)
    assert close(batch.loss("dr_grpo"), loss / 4 / LONGEST)
    assert close(batch.gradient("dr_grpo"), torch.tensor(slopes, dtype=torch.float64)[:, None] / 4 / LONGEST)


# --- Groups ----------------------------------------------------------------------------------------------------------


@every
def test_splits_in_whole_groups_add_up(name: str) -> None:
    batch = stale_batch(3, [3, 1, 2, 4, 1, 2])
    parts = batch.ids % 3  # of any size
    assert len(set(parts.tolist())) == 3
    total, loss, gradient = len(batch.groups()), torch.zeros(()), torch.zeros_like(batch.logps)
    for part in range(4):  # the last one is empty
        which = (parts == part).nonzero().squeeze(1)
        loss = loss + batch.take(which).loss(name, denominator=total)
        gradient[which] = batch.take(which).gradient(name, total)
    assert close(loss, batch.loss(name)) and close(gradient, batch.gradient(name))
    assert close(batch.loss(name, denominator=2.5), batch.loss(name) * total / 2.5)


@every
@pytest.mark.parametrize("value", [-50.0, -math.inf, math.nan])
def test_a_lone_member_contributes_nothing_whatever_it_holds(name: str, value: float) -> None:
    batch = stale_batch(5, [3, 1, 2])
    (lone,) = set(range(6)) - {i for group in batch.groups() for i in group}
    batch.mask[lone] = True
    rest = torch.tensor([i for i in range(6) if i != lone])
    columns = {column: getattr(batch, column).clone() for column in ("logps", "old", "refs", "rewards")}
    for tensor in columns.values():
        tensor[lone] = value
    odd = replace(batch, **columns)
    assert close(odd.loss(name), batch.take(rest).loss(name))
    assert not odd.gradient(name)[lone].any()
    assert close(odd.gradient(name)[rest], batch.take(rest).gradient(name))


@every
def test_a_broken_group_breaks_no_other(name: str) -> None:
    batch = stale_batch(6, [3, 2])
    small, large = sorted(batch.groups(), key=len)
    for column in ("logps", "refs", "rewards"):
        values = getattr(batch, column).clone()
        values[small] = math.nan
        gradient = replace(batch, **{column: values}).gradient(name)
        assert close(gradient[large], batch.gradient(name)[large])


@every
@pytest.mark.parametrize("denominator", [None, 0, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_group_to_teach_is_a_zero_with_a_graph(name: str, count: int, denominator: float | None) -> None:
    batch = stale_batch(0, [1, 1, 1]).take(torch.arange(count))
    leaf = batch.logps.clone().requires_grad_()
    loss = batch.loss(name, leaf, denominator)
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float64
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("name", [*PAIRED, "grpo", "dr_grpo", "rloo", "reinforce", "gvpo_no_cov_var"])
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e6])
def test_equal_rewards_teach_exactly_nothing(name: str, reward: float) -> None:
    beta = 0.0 if OBJECTIVES[name].takes_zero_beta else 0.3
    batch = stale_batch(8, [3, 5], beta=beta)
    batch = replace(batch, rewards=torch.full_like(batch.rewards, reward))
    assert batch.loss(name) == 0.0
    assert not batch.gradient(name).any()


@pytest.mark.parametrize("name", ["gvpo", "reinforce", "rloo", "grpo", "dr_grpo", "rebel", "kimi_pmd"])
def test_equal_rewards_still_pull_towards_the_reference(name: str) -> None:
    batch = stale_batch(8, [3, 5], beta=0.3)
    flat, other = (replace(batch, rewards=torch.full_like(batch.rewards, reward)) for reward in (0.0, 7.0))
    assert flat.gradient(name).abs().max() > 0.01
    assert close(flat.gradient(name), other.gradient(name))


@pytest.mark.parametrize("name", PAIRED)
def test_only_the_order_of_rewards_counts_for_preferences(name: str) -> None:
    batch = stale_batch(9, [4, 3])
    assert torch.equal(replace(batch, rewards=batch.rewards.exp()).gradient(name), batch.gradient(name))
    assert not torch.equal(replace(batch, rewards=-batch.rewards).gradient(name), batch.gradient(name))


# --- Numbers: masks, dtypes, graphs, extremes ------------------------------------------------------------------------


@on_tokens
def test_what_stands_where_nothing_is_scored_is_not_looked_at(name: str) -> None:
    batch = stale_batch(10, [3, 2, 1])
    for filling in (0.0, math.nan, math.inf, -math.inf):
        columns = {
            column: torch.where(batch.mask, getattr(batch, column), filling) for column in ("logps", "old", "refs")
        }
        filled = replace(batch, **columns)
        assert torch.equal(filled.loss(name), batch.loss(name))
        gradient = filled.gradient(name)
        assert torch.equal(gradient, batch.gradient(name)) and not gradient[~batch.mask].any()


@on_tokens
def test_wider_padding_changes_nothing(name: str) -> None:
    batch = stale_batch(11, [3, 2])
    columns = {column: torch.nn.functional.pad(getattr(batch, column), (0, 3)) for column in ("logps", "old", "refs")}
    wide = replace(batch, **columns, mask=torch.nn.functional.pad(batch.mask, (0, 3)))
    assert close(wide.loss(name), batch.loss(name)) and close(wide.gradient(name)[:, :-3], batch.gradient(name))


@on_tokens
def test_completions_without_tokens(name: str) -> None:
    batch = stale_batch(12, [3, 2])
    batch.mask[batch.groups()[0]] = False
    assert close(batch.loss(name), plain(name, batch)[0])
    for empty in (replace(batch, mask=torch.zeros_like(batch.mask)), stale_batch(12, [3, 2])):
        if empty.mask.any():  # no column at all
            columns = {column: getattr(empty, column)[:, :0] for column in ("logps", "old", "refs", "mask")}
            empty = replace(empty, **columns)
        assert math.isfinite(empty.loss(name)) and not empty.gradient(name).any()


@every
def test_only_the_policy_carries_a_gradient(name: str) -> None:
    batch = stale_batch(13, [3, 2])
    given = {column: getattr(batch, column).clone().requires_grad_() for column in ("logps", "old", "refs", "rewards")}
    replace(batch, **given).loss(name).backward()
    assert [column for column, values in given.items() if values.grad is not None] == ["logps"]


@every
def test_nothing_that_is_given_changes(name: str) -> None:
    batch = stale_batch(14)
    before = [getattr(batch, column).clone() for column in ("logps", "old", "refs", "mask", "rewards", "ids")]
    batch.gradient(name)
    after = [getattr(batch, column) for column in ("logps", "old", "refs", "mask", "rewards", "ids")]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@every
def test_float32_is_computed_in_float64(name: str) -> None:
    batch = stale_batch(15, [3, 2])
    single = replace(batch, logps=batch.logps.float(), old=batch.old.float(), refs=batch.refs.float())
    double = replace(single, logps=single.logps.double(), old=single.old.double(), refs=single.refs.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = single.loss(name)
    assert loss.dtype == torch.float64
    assert torch.allclose(loss, double.loss(name), rtol=1e-5)  # the sums over tokens are float32, here in the test
    assert single.gradient(name).dtype == torch.float32
    if name in TOKENS:
        assert torch.equal(loss, double.loss(name))


@on_tokens
@pytest.mark.parametrize("nats", [800.0, 1e5])
def test_a_ratio_beyond_floating_point(name: str, nats: float) -> None:
    # exp of it is infinite. Where it is clipped, or multiplied by nothing, it must be as if it were merely large.
    old = torch.full((4, 1), -nats - 1, dtype=torch.float64)
    logps = old.clone()
    logps[[0, 2, 3]] = -1.0
    mask, ids = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    batch = Batch(logps, old, logps, mask, torch.tensor([1.0, 0.0, 5.0, 5.0]), ids, 0.0)
    large = replace(batch, old=torch.where(logps == old, old, -11.0))
    assert close(batch.loss(name), large.loss(name))
    assert close(batch.gradient(name), large.gradient(name)) and batch.gradient(name)[1] > 0
    lost = replace(batch, rewards=torch.tensor([0.0, 1.0, 5.0, 5.0]))  # nothing bounds this one: it must not look well
    assert not math.isfinite(lost.loss(name)) and not lost.gradient(name).isfinite().all()


def test_far_losers_of_preferences_do_not_overflow() -> None:
    logps = torch.tensor([[-1e5], [-1.0]], dtype=torch.float64)
    flat = torch.zeros_like(logps)
    batch = Batch(logps, flat, flat, flat == 0, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 2.0)
    assert close(batch.loss("dpo"), 2.0 * (1e5 - 1))
    assert batch.gradient("dpo").flatten().tolist() == [-2.0, 2.0]


# --- Refusals --------------------------------------------------------------------------------------------------------


def arguments(name: str) -> dict[str, Any]:
    batch = stale_batch(30, [2])
    common = {"rewards_N": batch.rewards, "group_ids_N": batch.ids, "beta": 0.5}
    if name in TOKENS:
        tokens = {"logps_NT": batch.logps, "old_logps_NT": batch.old, "ref_logps_NT": batch.refs}
        return {**tokens, "mask_NT": batch.mask, **common}
    return {"logps_N": batch.summed(batch.logps), "ref_logps_N": batch.summed(batch.refs), **common}


def refused(name: str, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        OBJECTIVES[name].loss(**arguments(name) | changes)
    assert type(caught.value) is error and "\n" not in str(caught.value)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(name: str, dtype: torch.dtype) -> None:
    for argument, values in arguments(name).items():
        if "logps" in argument:
            refused(name, TypeError, f"{argument} is {dtype}: cast the model output", **{argument: values.to(dtype)})
    refused(name, TypeError, f"rewards_N is {dtype}", rewards_N=torch.zeros(2, dtype=dtype))


@every
def test_bad_arguments_are_named(name: str) -> None:
    refused(name, ValueError, "rewards_N has 3 members", rewards_N=torch.zeros(3))
    refused(name, ValueError, "group_ids_N has 1 members", group_ids_N=torch.zeros(1, dtype=torch.long))
    refused(name, TypeError, "group_ids_N is torch.float32", group_ids_N=torch.zeros(2))
    refused(name, ValueError, "denominator must not be negative", denominator=-1)
    refused(name, ValueError, "denominator is 0 with 1 group", denominator=0)
    refused(name, TypeError, "beta must be a number", beta="0.1")
    refused(name, ValueError, "beta must be finite", beta=math.nan)
    refused(name, ValueError, "beta must", beta=-0.1)
    if OBJECTIVES[name].takes_zero_beta:
        assert math.isfinite(OBJECTIVES[name].loss(**arguments(name) | {"beta": 0}))
    else:
        refused(name, ValueError, "beta must be greater than 0", beta=0)


@on_tokens
def test_bad_tokens_are_named(name: str) -> None:
    given = arguments(name)
    wide = torch.zeros(2, 6, dtype=torch.float64)
    refused(name, TypeError, "mask_NT is torch.int64: give bool", mask_NT=given["mask_NT"].long())
    refused(name, TypeError, "mask_NT must be a torch.Tensor", mask_NT=given["mask_NT"].tolist())
    refused(name, ValueError, r"mask_NT is \(2, 6\)", mask_NT=wide.bool())
    for argument in ("old_logps_NT", "ref_logps_NT"):
        refused(name, TypeError, f"{argument} is torch.int64", **{argument: given[argument].long()})
        refused(name, ValueError, rf"{argument} is \(2, 6\) .* and logps_NT \(2, 5\)", **{argument: wide})
        refused(name, ValueError, f"{argument} is .* on meta", **{argument: given[argument].to("meta")})
    refused(name, ValueError, "logps_NT must have rank 2", logps_NT=torch.zeros(2))
    refused(name, ValueError, "epsilon must be greater than 0", epsilon=0)
    refused(name, ValueError, "epsilon must be finite", epsilon=math.inf)
    if "max_completion_length" in OBJECTIVES[name].settings:
        refused(name, ValueError, "max_completion_length must be greater than 0", max_completion_length=0)
