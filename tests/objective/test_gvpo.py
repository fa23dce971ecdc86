"""The objective against hand arithmetic, an independent pairwise formula, its theorems, and its refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gvpo.objective import gvpo_components, gvpo_loss, gvpo_weights

ALL = ("reward", "covariance", "variance")
fuzzed = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Batch:
    """Arguments of the objective, in float64; `ids` may be interleaved and groups ragged."""

    logps: Tensor
    refs: Tensor
    rewards: Tensor
    ids: Tensor
    beta: float

    def take(self, which: Tensor) -> Batch:
        return Batch(self.logps[which], self.refs[which], self.rewards[which], self.ids[which], self.beta)

    def loss(self, denominator: float | None = None) -> Tensor:
        return gvpo_loss(self.logps, self.refs, self.rewards, self.ids, beta=self.beta, denominator=denominator)

    def weights(self, components: Collection[str] = ALL) -> Tensor:
        return gvpo_weights(self.logps, self.refs, self.rewards, self.ids, beta=self.beta, components=components)

    def components(self) -> dict[str, Tensor]:
        return gvpo_components(self.logps, self.refs, self.rewards, self.ids, beta=self.beta)

    def members(self) -> list[list[int]]:
        """Positions of each group of two or more, in plain Python: no code shared with the objective."""
        ids = self.ids.tolist()
        groups = [[i for i, other in enumerate(ids) if other == label] for label in sorted(set(ids))]
        return [group for group in groups if len(group) >= 2]


def example(logps: list[float], refs: list[float], rewards: list[float], ids: list[int], beta: float) -> Batch:
    logps_N, refs_N, rewards_N = (torch.tensor(column, dtype=torch.float64) for column in (logps, refs, rewards))
    return Batch(logps_N, refs_N, rewards_N, torch.tensor(ids, dtype=torch.int64), beta)


def concatenated(*batches: Batch) -> Batch:
    columns = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("logps", "refs", "rewards", "ids")}
    return Batch(**columns, beta=batches[0].beta)


@st.composite
def stale_batches(draw: st.DrawFn, min_size: int = 1, max_groups: int = 4) -> Batch:
    """Ragged, shuffled groups under arbitrary ids; every log-ratio is 5 to 60 nats, up or down."""
    sizes = draw(st.lists(st.integers(min_size, 5), min_size=1, max_size=max_groups))
    labels = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(sizes), max_size=len(sizes), unique=True))
    ids = draw(st.permutations([label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]))

    def column(low: float, high: float) -> list[float]:
        return draw(st.lists(st.floats(low, high, width=32), min_size=len(ids), max_size=len(ids)))

    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=len(ids), max_size=len(ids)))
    refs = column(-200, -60)
    logps = [r + sign * ratio for r, sign, ratio in zip(refs, signs, column(5, 60), strict=True)]
    return example(logps, refs, column(-3, 3), ids, draw(st.floats(0.015625, 2, width=32)))


def gradient(loss_of: Callable[[Tensor], Tensor], logps: Tensor) -> Tensor:
    leaf = logps.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0]


def loss_gradient(batch: Batch) -> Tensor:
    return gradient(lambda logps: replace(batch, logps=logps).loss(), batch.logps)


def close(actual: Tensor, expected: Tensor | float, relative: float = 1e-9, scale: float = 1.0) -> bool:
    """Equal to `relative` of the largest number met on the way, at least 1."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return bool((actual - expected).abs().le(relative * max(1.0, scale, float(expected.abs().amax()))).all())


def pairwise_loss(batch: Batch, logps: np.ndarray) -> float:
    """The loss without centring, for a = R - beta (l - r): sum_i (a_i - abar)^2 = 1/k sum_{i<j} (a_i - a_j)^2."""
    a = batch.rewards.numpy() - batch.beta * (logps - batch.refs.numpy())
    losses = [
        sum((a[i] - a[j]) ** 2 for i, j in itertools.combinations(group, 2)) / (2 * len(group) * (len(group) - 1))
        for group in batch.members()
    ]
    return float(np.mean(losses)) if losses else 0.0


# --- By hand ---------------------------------------------------------------------------------------------------------

# k = 2, beta = 1/2. Log-ratios (1, -1), implicit rewards (1/2, -1/2), rewards centred (-1/2, 1/2): residuals (1, -1).
PAIR = example([-3, -5], [-4, -4], [0, 1], [7, 7], 0.5)
# k = 3, beta = 2. l - lbar = (2, 1, -3), r - rbar = (-1, 1, 0), so 2 x their difference is (6, 0, -6);
# R - Rbar = (0, -1, 1): residuals (6, 1, -7).
TRIPLE = example([-1, -2, -6], [-3, -1, -2], [1, 0, 2], [-4, -4, -4], 2.0)


def test_pair_by_hand() -> None:
    assert PAIR.loss().item() == 1.0  # (1 + 1) / (2 * 1)
    assert PAIR.weights().tolist() == [-1.0, 1.0]  # minus the residuals
    assert loss_gradient(PAIR).tolist() == [0.5, -0.5]  # -(beta / 1) w
    # l - lbar = (1, -1) and R - Rbar = (-1/2, 1/2): Cov = -1. r is constant: Cov = 0. Var l = 2.
    # R + beta r = (-2, -1): half the variance of 1/2.
    moments = {name: value.item() for name, value in PAIR.components().items()}
    assert moments == {"reward_cov": -1.0, "ref_cov": 0.0, "var": 2.0, "constant": 0.25}


def test_triple_by_hand() -> None:
    assert TRIPLE.loss().item() == 21.5  # (36 + 1 + 49) / (2 * 2)
    assert TRIPLE.weights().tolist() == [-6.0, -1.0, 7.0]
    assert loss_gradient(TRIPLE).tolist() == [6.0, 1.0, -7.0]  # -(2 / 2) w
    # Cov(l, R) = (0 - 1 - 3) / 2, Cov(l, r) = (-2 + 1 + 0) / 2, Var l = (4 + 1 + 9) / 2;
    # R + 2 r centred is (-2, 1, 1): half of 6 / 2.
    moments = {name: value.item() for name, value in TRIPLE.components().items()}
    assert moments == {"reward_cov": -2.0, "ref_cov": -0.5, "var": 7.0, "constant": 1.5}


def test_ragged_batch_by_hand() -> None:
    # PAIR at beta 2 has residuals (2, -2) - (-1/2, 1/2) = (5/2, -5/2), loss 25/4; with TRIPLE and a lone member between
    # them the mean is over two groups: (25/4 + 43/2) / 2.
    lone = example([-9], [-2], [5], [0], 2.0)
    batch = concatenated(replace(PAIR, beta=2.0), lone, TRIPLE).take(torch.tensor([3, 0, 5, 2, 1, 4]))
    assert batch.loss().item() == 13.875
    assert batch.weights().tolist() == [-6.0, -2.5, 7.0, 0.0, 2.5, -1.0]
    assert loss_gradient(batch).tolist() == [3.0, 2.5, -3.5, 0.0, -2.5, 0.5]  # -(2 / (k - 1)) w / 2 groups


@pytest.mark.parametrize(
    ("components", "expected"),
    [  # from (R - Rbar), 2 (r - rbar), -2 (l - lbar) = (0, -1, 1), (-2, 2, 0), (-4, -2, 6)
        (["reward"], [0, -1, 1]),
        (["covariance"], [-2, 2, 0]),
        (["variance"], [-4, -2, 6]),
        (["reward", "covariance"], [-2, 1, 1]),
        ({"variance", "reward"}, [-4, -3, 7]),
        (("variance", "covariance"), [-6, 0, 6]),
        (ALL, [-6, -1, 7]),
    ],
)
def test_component_switches_by_hand(components: Collection[str], expected: list[float]) -> None:
    assert TRIPLE.weights(components).tolist() == expected


# --- Against independent forms ---------------------------------------------------------------------------------------


@fuzzed
@given(stale_batches())
def test_loss_and_gradient_match_the_pairwise_formula(batch: Batch) -> None:
    logps = batch.logps.numpy()
    loss = pairwise_loss(batch, logps)
    assert close(batch.loss(), loss)
    # The loss is quadratic in the log-probs, so a central difference is exact at any step: take a whole nat.
    nudges = np.eye(len(logps))
    slopes = [(pairwise_loss(batch, logps + e) - pairwise_loss(batch, logps - e)) / 2 for e in nudges]
    assert close(loss_gradient(batch), torch.tensor(slopes, dtype=torch.float64), scale=loss)


@fuzzed
@given(stale_batches())
def test_the_three_forms_have_the_same_gradient(batch: Batch) -> None:
    def nll(logps: Tensor) -> Tensor:
        weights = replace(batch, logps=logps).weights()
        groups = batch.members()
        sums = [(weights[group] * logps[group]).sum() * -batch.beta / (len(group) - 1) for group in groups]
        return torch.stack([0 * logps.sum(), *sums]).sum() / max(len(groups), 1)

    def moments(logps: Tensor) -> Tensor:
        c, beta = replace(batch, logps=logps).components(), batch.beta
        return -beta * c["reward_cov"] - beta**2 * c["ref_cov"] + beta**2 / 2 * c["var"] + c["constant"]

    expected = loss_gradient(batch)
    assert close(gradient(nll, batch.logps), expected)
    assert close(gradient(moments, batch.logps), expected)
    assert close(moments(batch.logps), batch.loss())


@fuzzed
@given(stale_batches())
def test_weights_sum_to_zero_in_each_group(batch: Batch) -> None:
    weights = batch.weights()
    for group in batch.members():
        assert close(weights[group].sum(), 0.0, scale=float(weights.abs().amax()))


# --- Invariances -----------------------------------------------------------------------------------------------------


def assert_same(batch: Batch, other: Batch, scale: float = 1.0) -> None:
    assert close(other.loss(), batch.loss(), scale=scale**2)
    assert close(other.weights(), batch.weights(), scale=scale)
    assert close(loss_gradient(other), loss_gradient(batch), scale=scale)


@fuzzed
@given(stale_batches(), st.sampled_from(["logps", "refs", "rewards"]), st.data())
def test_a_constant_per_prompt_changes_nothing(batch: Batch, column: str, data: st.DataObject) -> None:
    shift = {label: data.draw(st.floats(-1000, 1000)) for label in sorted(set(batch.ids.tolist()))}
    shifts = torch.tensor([shift[label] for label in batch.ids.tolist()], dtype=torch.float64)
    assert_same(batch, replace(batch, **{column: getattr(batch, column) + shifts}), scale=100)


@fuzzed
@given(stale_batches(), st.data())
def test_order_permutes_the_weights_and_nothing_else(batch: Batch, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(batch.ids)))))
    shuffled = batch.take(order)
    assert close(shuffled.loss(), batch.loss())
    assert close(shuffled.weights(), batch.weights()[order])
    assert close(loss_gradient(shuffled), loss_gradient(batch)[order])


@fuzzed
@given(stale_batches(), st.data())
def test_names_of_groups_do_not_matter(batch: Batch, data: st.DataObject) -> None:
    labels = sorted(set(batch.ids.tolist()))
    names = data.draw(st.lists(st.integers(-128, 127), min_size=len(labels), max_size=len(labels), unique=True))
    ids = torch.tensor([dict(zip(labels, names, strict=True))[label] for label in batch.ids.tolist()], dtype=torch.int8)
    assert_same(batch, replace(batch, ids=ids))


@fuzzed
@given(stale_batches(min_size=2), st.integers(1, 3))
def test_lone_members_contribute_nothing(batch: Batch, count: int) -> None:
    free = [label for label in range(len(batch.ids) + count) if label not in batch.ids.tolist()][:count]
    lone = example([-50.0] * count, [-3.0] * count, [9.0] * count, free, batch.beta)
    both = concatenated(lone, batch)
    assert close(both.loss(), batch.loss())
    assert both.weights()[:count].tolist() == [0.0] * count
    assert loss_gradient(both)[:count].tolist() == [0.0] * count
    assert close(loss_gradient(both)[count:], loss_gradient(batch))
    for name, value in batch.components().items():
        assert close(both.components()[name], value)


@fuzzed
@given(stale_batches(min_size=2, max_groups=1))
def test_a_group_given_twice_has_the_same_mean(batch: Batch) -> None:
    twice = concatenated(batch, replace(batch, ids=batch.ids ^ 1))
    assert close(twice.loss(), batch.loss())
    for name, value in batch.components().items():
        assert close(twice.components()[name], value)


@fuzzed
@given(stale_batches(), st.data())
def test_splits_in_whole_groups_add_up(batch: Batch, data: st.DataObject) -> None:
    part_of = {label: data.draw(st.integers(0, 2)) for label in sorted(set(batch.ids.tolist()))}
    parts = torch.tensor([part_of[label] for label in batch.ids.tolist()])
    total = len(batch.members())
    losses, gradients = [], torch.zeros_like(batch.logps)
    for part in range(3):  # some parts are empty, or hold lone members only
        which = (parts == part).nonzero().squeeze(1)
        micro = batch.take(which)
        losses.append(micro.loss(denominator=total))
        gradients[which] = gradient(lambda logps, micro=micro: replace(micro, logps=logps).loss(total), micro.logps)
    assert close(torch.stack(losses).sum(), batch.loss())
    assert close(gradients, loss_gradient(batch))


def test_a_wrong_grouping_shows_on_stale_data_only() -> None:
    # Two prompts, the completions of one drifted up by some 20 nats, of the other down; one member of each swapped.
    refs, rewards = [-40.0, -55.0, -35.0, -80.0, -60.0, -70.0], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    drift = [20.0, 18.0, 23.0, -20.0, -17.0, -22.0]
    logps = [r + d for r, d in zip(refs, drift, strict=True)]
    stale = example(logps, refs, rewards, [0, 0, 0, 1, 1, 1], 0.1)
    swapped = torch.tensor([1, 0, 0, 0, 1, 1])

    right, wrong = loss_gradient(stale), loss_gradient(replace(stale, ids=swapped))
    assert torch.cosine_similarity(right, wrong, dim=0) < 0.95
    # The swapped members have the same reward: with log-ratios of zero nothing could tell.
    fresh = replace(stale, logps=stale.refs)
    assert torch.equal(loss_gradient(fresh), loss_gradient(replace(fresh, ids=swapped)))


# --- The estimator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinitePrompt:
    """A prompt with five possible completions: where they are drawn from, and everything the loss asks of each."""

    probs: Tensor
    outcomes: Batch

    def half_variance(self) -> float:
        gap = self.outcomes.beta * (self.outcomes.logps - self.outcomes.refs) - self.outcomes.rewards
        return 0.5 * float((self.probs * gap**2).sum() - (self.probs * gap).sum() ** 2)


def finite_prompt(seed: int, beta: float = 0.3) -> FinitePrompt:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [3.0]])
    sampling, policy, reference = logits.log_softmax(dim=1)
    rewards = torch.rand(5, generator=generator, dtype=torch.float64)
    return FinitePrompt(sampling.exp(), Batch(policy, reference, rewards, torch.zeros(5, dtype=torch.long), beta))


@pytest.mark.parametrize("k", [2, 3])
def test_unbiased_by_enumeration(k: int) -> None:
    prompt = finite_prompt(seed=k)
    expectation = sum(
        prompt.probs[list(draws)].prod() * prompt.outcomes.take(torch.tensor(draws)).loss()
        for draws in itertools.product(range(5), repeat=k)
    )
    assert close(torch.as_tensor(expectation), prompt.half_variance(), relative=1e-12)


def test_unbiased_by_monte_carlo_with_ragged_groups() -> None:
    # 400 batches of 40 groups, k = 2, 3, 5, 8: the standard error is that of 400 independent batch means. A factor 1/k
    # in place of 1/(k - 1) would sit at (1/2 + 2/3 + 4/5 + 7/8) / 4 = 71 % of the value.
    prompt, generator = finite_prompt(seed=0), torch.Generator().manual_seed(1)
    ids = torch.repeat_interleave(torch.arange(40), torch.tensor([2, 3, 5, 8] * 10))
    draws = torch.multinomial(prompt.probs.expand(400, -1), len(ids), replacement=True, generator=generator)
    means = torch.stack([replace(prompt.outcomes.take(drawn), ids=ids).loss() for drawn in draws])
    standard_error = float(means.std()) / math.sqrt(len(means))
    assert standard_error < 0.03 * prompt.half_variance()
    assert abs(float(means.mean()) - prompt.half_variance()) < 4 * standard_error


# --- Numbers: extremes, dtypes, graphs -------------------------------------------------------------------------------


def test_extreme_log_ratios_in_float32_match_exact_arithmetic() -> None:
    refs = torch.tensor([-1e5, -1e5, -99990.5, -4.0, -7000.25])
    logps = refs + torch.tensor([5000.0, -5000.0, 0.125, -5000.0, 5000.0])
    rewards, beta = torch.tensor([1.0, 0.1, 0.7, 0.0, 1.0]), 0.1
    a = [
        Fraction(reward) - Fraction(beta) * (Fraction(logp) - Fraction(ref))
        for reward, logp, ref in zip(rewards.tolist(), logps.tolist(), refs.tolist(), strict=True)
    ]
    expected_weights = [value - sum(a) / 5 for value in a]
    expected_loss = sum(w**2 for w in expected_weights) / 8

    logps.requires_grad_()
    loss = gvpo_loss(logps, refs, rewards, torch.zeros(5, dtype=torch.long), beta=beta)
    loss.backward()
    assert close(loss.detach(), float(expected_loss), relative=1e-13)
    weights = gvpo_weights(logps, refs, rewards, torch.zeros(5, dtype=torch.long), beta=beta)
    assert close(weights, torch.tensor([float(w) for w in expected_weights], dtype=torch.float64), relative=1e-13)
    slopes = torch.tensor([float(-Fraction(beta) / 4 * w) for w in expected_weights], dtype=torch.float64)
    assert logps.grad is not None and close(logps.grad.double(), slopes, relative=1e-7)  # stored in float32


def test_far_apart_components_still_add_up() -> None:
    # Completions of very different lengths: moments near 1e10 that cancel to the loss, right to 1e-12 of their size.
    batch = example([-1e5, -10, -3e4], [-1e5 + 5000, -12, -3e4 - 4000], [1, 0, 1], [0, 0, 0], 2.0)
    c = batch.components()
    total = -2 * c["reward_cov"] - 4 * c["ref_cov"] + 2 * c["var"] + c["constant"]
    assert close(total, batch.loss(), relative=1e-12, scale=float(2 * c["var"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_results_are_float64_for_every_reward_dtype(dtype: torch.dtype) -> None:
    rewards = torch.tensor([0, 1]).to(dtype)
    logps, refs = PAIR.logps.float(), PAIR.refs.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gvpo_loss(logps, refs, rewards, PAIR.ids, beta=0.5)
        weights = gvpo_weights(logps, refs, rewards, PAIR.ids, beta=0.5)
        moments = gvpo_components(logps, refs, rewards, PAIR.ids, beta=0.5)
    assert (loss.item(), weights.tolist(), moments["constant"].item()) == (1.0, [-1.0, 1.0], 0.25)
    assert {t.dtype for t in (loss, weights, *moments.values())} == {torch.float64}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
)
def test_group_ids_of_every_integer_dtype(dtype: torch.dtype) -> None:
    assert replace(TRIPLE, ids=torch.tensor([9, 9, 3]).to(dtype)).weights()[2] == 0.0
    assert replace(TRIPLE, ids=torch.tensor([9, 9, 9]).to(dtype)).loss().item() == 21.5


def test_only_the_policy_carries_a_gradient() -> None:
    logps, refs, rewards = (t.clone().requires_grad_() for t in (TRIPLE.logps, TRIPLE.refs, TRIPLE.rewards))
    batch = Batch(logps, refs, rewards, TRIPLE.ids, 2.0)
    moments = batch.components()
    (batch.loss() + moments["reward_cov"] + moments["ref_cov"] + moments["var"]).backward()
    assert logps.grad is not None and refs.grad is None and rewards.grad is None
    assert not batch.weights().requires_grad
    assert not moments["constant"].requires_grad


@pytest.mark.parametrize("denominator", [None, 0, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_group_to_teach_is_a_zero_with_a_graph(count: int, denominator: float | None) -> None:
    batch = example([-3.7] * count, [-0.1] * count, [0.3] * count, list(range(count)), 0.7)
    logps = batch.logps.requires_grad_()
    loss = batch.loss(denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert logps.grad is not None and logps.grad.tolist() == [0.0] * count
    assert batch.weights().tolist() == [0.0] * count
    assert [value.item() for value in batch.components().values()] == [0.0] * 4


# --- Refusals --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "logps_N": torch.tensor([-3.0, -5.0]),
    "ref_logps_N": torch.tensor([-4.0, -4.0]),
    "rewards_N": torch.tensor([0.0, 1.0]),
    "group_ids_N": torch.tensor([7, 7]),
    "beta": 0.5,
}
FUNCTIONS = [gvpo_weights, gvpo_loss, gvpo_components]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["logps_N", "ref_logps_N", "rewards_N"])
def test_half_precision_is_refused(function: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    advice = "rewards are float32" if name == "rewards_N" else "cast the model output to float32 before summing"
    with pytest.raises(TypeError, match=f"^{name} is {dtype}: {advice}"):
        function(**GOOD | {name: GOOD[name].to(dtype)})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logps_N", [-3.0, -5.0], TypeError, "logps_N must be a torch.Tensor, got list"),
        ("ref_logps_N", torch.tensor([-4, -4]), TypeError, "ref_logps_N is torch.int64: log-probabilities are float32"),
        ("rewards_N", torch.tensor([0j, 1j]), TypeError, "rewards_N is torch.complex64: rewards are float32"),
        ("group_ids_N", torch.tensor([7.0, 7.0]), TypeError, "group_ids_N is torch.float32: group ids are integers"),
        ("group_ids_N", torch.tensor([True, True]), TypeError, "group_ids_N is torch.bool: group ids are integers"),
        ("logps_N", torch.tensor(-3.0), ValueError, r"logps_N must have rank 1, .* got shape \(\)"),
        ("rewards_N", torch.zeros(1, 2), ValueError, r"rewards_N must have rank 1, .* got shape \(1, 2\)"),
        ("ref_logps_N", torch.zeros(1), ValueError, "ref_logps_N has 1 members and logps_N has 2"),
        ("group_ids_N", torch.tensor([7, 7, 7]), ValueError, "group_ids_N has 3 members and logps_N has 2"),
        ("rewards_N", torch.zeros(2, device="meta"), ValueError, "rewards_N is on meta and logps_N on cpu"),
        ("beta", 0.0, ValueError, "beta must be greater than 0, got 0.0"),
        ("beta", -0.1, ValueError, "beta must be greater than 0, got -0.1"),
        ("beta", math.nan, ValueError, "beta must be finite, got nan"),
        ("beta", math.inf, ValueError, "beta must be finite, got inf"),
        ("beta", "0.1", TypeError, "beta must be a number, got str"),
    ],
)
def test_bad_arguments_are_named(
    function: Callable[..., Any], name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        function(**GOOD | {name: value})
    assert type(caught.value) is error and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ((), r"components must be a non-empty subset of \('reward', 'covariance', 'variance'\), got none"),
        (("reward", "entropy"), "components must be .* got the unknown 'entropy'"),
        ("reward", r"components must be .* got a bare string: write \('reward',\)"),
    ],
)
def test_bad_components_are_named(components: Collection[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        gvpo_weights(**GOOD, components=components)


@pytest.mark.parametrize(
    ("denominator", "message"),
    [
        (-1, "denominator must not be negative, got -1"),
        (0, "denominator is 0 with 1 group"),
        (math.inf, "denominator must be finite, got inf"),
    ],
)
def test_bad_denominators_are_named(denominator: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        gvpo_loss(**GOOD, denominator=denominator)
