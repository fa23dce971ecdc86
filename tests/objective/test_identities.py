"""What the objectives are of each other: identities, to rounding."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from paper_formulas import (
    LONGEST,
    Batch,
    close,
    stale_batch,
)
from torch import Tensor

from gvpo.objective import OBJECTIVES, gvpo_components


def sequence_gradient(batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient with respect to log-probs of sequences."""
    leaf = batch.summed(batch.logps).requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def returns(batch: Batch, logps_N: Tensor) -> Tensor:
    """R - beta (l - r)."""
    return batch.rewards - batch.beta * (logps_N - batch.summed(batch.refs))


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_reinforce_with_its_kl_in_the_reward_is_gvpo(k: int) -> None:
    batch = stale_batch(k, [k, k, k])
    factor = (k - 1) / (batch.beta * k)
    assert close(batch.gradient("reinforce"), factor * batch.gradient("gvpo"))


@pytest.mark.parametrize("sizes", [[2], [3, 3], [2, 1, 5, 3]])
def test_rloo_on_its_own_samples_is_gvpo(sizes: list[int]) -> None:
    batch = stale_batch(20, sizes)
    batch = replace(batch, old=batch.logps)
    assert close(batch.gradient("rloo"), batch.gradient("gvpo") / batch.beta)


@pytest.mark.parametrize("k", [2, 5])
def test_dr_grpo_on_its_own_samples_is_gvpo(k: int) -> None:
    """On-policy with the policy as its reference: no ratio, no log-ratio, a KL term at its minimum."""
    batch = stale_batch(23, [k, k, k])
    batch = replace(batch, old=batch.logps, refs=batch.logps)
    assert close(batch.gradient("dr_grpo"), batch.gradient("gvpo") * (k - 1) / (batch.beta * k * LONGEST))


@pytest.mark.parametrize("sizes", [[2, 2], [5], [2, 1, 5, 3]])
def test_rebel_over_all_pairs_is_gvpo(sizes: list[int]) -> None:
    batch = stale_batch(21, sizes)
    assert close(batch.loss("rebel"), 4 / batch.beta**2 * batch.loss("gvpo"))
    assert close(batch.gradient("rebel"), 4 / batch.beta**2 * batch.gradient("gvpo"))


def test_ipo_is_gvpo_on_pairs_whose_rewards_differ_by_a_half() -> None:
    batch = stale_batch(22, [2, 2, 1, 2])
    for group in batch.groups():
        batch.rewards[group] = torch.tensor([0.2, 0.7], dtype=torch.float64) + 10 * torch.rand(1).double()
    assert close(batch.loss("ipo"), 4 / batch.beta**2 * batch.loss("gvpo"))
    assert close(batch.gradient("ipo"), 4 / batch.beta**2 * batch.gradient("gvpo"))
    # For three members it is not: the middle one would have to be a half from both.
    three = stale_batch(22, [3])
    three = replace(three, rewards=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert not close(three.gradient("ipo"), 4 / three.beta**2 * three.gradient("gvpo"))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_kimis_loss_is_gvpo_with_the_mean_log_ratio_held_at_zero(k: int) -> None:
    batch = stale_batch(23, [k, k], beta=0.5)

    def mean_term(logps_N: Tensor) -> Tensor:
        means = [(logps_N - batch.summed(batch.refs))[group].mean() for group in batch.groups()]
        return (batch.beta * torch.stack(means)).square().mean() * k / (2 * (k - 1))

    # Kimi's sum of squares over 2(k - 1), as in gvpo_loss.
    scaled = batch.beta * k / (k - 1) * batch.loss("kimi_pmd")
    logps_N = batch.summed(batch.logps)
    assert close(scaled, batch.loss("gvpo") + mean_term(logps_N))

    def ours(name: str, scale: float = 1.0) -> Tensor:
        function = OBJECTIVES[name].loss
        return sequence_gradient(
            batch,
            lambda leaf: scale * function(leaf, batch.summed(batch.refs), batch.rewards, batch.ids, beta=batch.beta),
        )

    extra = sequence_gradient(batch, mean_term)
    assert close(ours("kimi_pmd", batch.beta * k / (k - 1)), ours("gvpo") + extra)
    assert extra.abs().max() > 0.01


@pytest.mark.parametrize("k", [2, 3, 6])
def test_contrastive_policy_gradient_is_gvpo(k: int) -> None:
    batch = stale_batch(24, [k, k])

    def copg(logps_N: Tensor) -> Tensor:
        """1/(k - 1) sum over pairs of (a_i - a_j)^2 (arXiv 2406.19185)."""
        a = returns(batch, logps_N)
        sums = [
            torch.stack([(a[i] - a[j]) ** 2 for i, j in itertools.combinations(group, 2)]).sum() / (k - 1)
            for group in batch.groups()
        ]
        return torch.stack(sums).mean()

    # sum over pairs = k sum_i (a_i - abar)^2, and gvpo_loss is that sum over 2(k - 1).
    assert close(copg(batch.summed(batch.logps)), 2 * k * batch.loss("gvpo"))
    refs = batch.summed(batch.refs)
    gvpo_gradient = sequence_gradient(
        batch, lambda leaf: OBJECTIVES["gvpo"].loss(leaf, refs, batch.rewards, batch.ids, beta=batch.beta)
    )
    assert close(sequence_gradient(batch, copg), 2 * k * gvpo_gradient)


def test_ablations_are_terms_of_gvpos_gradient() -> None:
    batch = stale_batch(25, [3, 1, 2, 4])
    beta, refs = batch.beta, batch.summed(batch.refs)

    def term(name: str) -> Tensor:
        leaf = batch.logps.clone().requires_grad_()
        moments = gvpo_components(batch.summed(leaf), refs, batch.rewards, batch.ids, beta=beta)
        return torch.autograd.grad(moments[name], leaf)[0]

    reward, covariance, variance = -beta * term("reward_cov"), -(beta**2) * term("ref_cov"), beta**2 / 2 * term("var")
    assert close(batch.gradient("gvpo_no_cov_var"), reward)
    assert close(batch.gradient("gvpo_no_cov"), reward + variance)
    assert close(batch.gradient("gvpo_no_var"), reward + covariance)
    sum_of_both = batch.gradient("gvpo_no_cov") + batch.gradient("gvpo_no_var")
    assert close(sum_of_both - batch.gradient("gvpo_no_cov_var"), batch.gradient("gvpo"))


@pytest.mark.parametrize("k", [2, 5])
def test_the_rewards_term_alone_is_reinforce_with_a_mean_baseline(k: int) -> None:
    batch = stale_batch(26, [k, k])
    plain_reinforce = replace(batch, beta=0.0).gradient("reinforce")
    assert close(batch.gradient("gvpo_no_cov_var"), batch.beta * k / (k - 1) * plain_reinforce)


def test_where_the_regressions_are_at_rest() -> None:
    batch = stale_batch(27, [3, 4], beta=0.5)
    batch.mask[:] = True
    drift = {group[0]: 5.0 * n - 20 for n, group in enumerate(batch.groups())}

    def at(targets_N: Tensor) -> Batch:
        share = (targets_N - batch.summed(batch.logps)) / batch.logps.shape[1]
        return replace(batch, logps=batch.logps + share[:, None])

    def offset(per_group: dict[int, float]) -> Tensor:
        values = torch.zeros(7, dtype=torch.float64)
        for group in batch.groups():
            values[group] = per_group[group[0]]
        return values

    refs, scaled, moved = batch.summed(batch.refs), batch.rewards / batch.beta, offset(drift)
    optimum = at(refs + scaled + moved)
    for name in ("gvpo", "reinforce", "rebel"):
        assert optimum.gradient(name).abs().max() < 1e-9
        assert batch.gradient(name).abs().max() > 0.1
    # Kimi's is at rest where the log-ratios are centred too, and without the covariance the reference is forgotten.
    assert optimum.gradient("kimi_pmd").abs().max() > 0.1
    means = offset({group[0]: float(scaled[group].mean()) for group in batch.groups()})
    assert at(refs + scaled - means).gradient("kimi_pmd").abs().max() < 1e-9
    assert at(scaled + moved).gradient("gvpo_no_cov").abs().max() < 1e-9
    assert optimum.gradient("gvpo_no_cov").abs().max() > 0.1


def test_preferences_between_two_are_a_logistic_loss() -> None:
    # Implicit rewards 0.5 x (1 - (-2)) apart, the better one first: log(1 + e^-1.5), slope -0.5 / (1 + e^1.5).
    refs = torch.tensor([[-3.0], [-4.0]], dtype=torch.float64)
    logps = refs + torch.tensor([[1.0], [-2.0]])
    batch = Batch(logps, refs, refs, refs < 0, torch.tensor([2, 1]), torch.tensor([0, 0]), 0.5)
    assert close(batch.loss("dpo"), math.log1p(math.exp(-1.5)))
    slope = 0.5 / (1 + math.exp(1.5))
    assert close(batch.gradient("dpo").flatten(), torch.tensor([-slope, slope], dtype=torch.float64))
    worse = replace(batch, rewards=torch.tensor([1, 2]))
    assert close(worse.loss("dpo"), math.log1p(math.exp(1.5)))


def test_dr_grpo_is_grpo_without_its_two_divisions() -> None:
    batch = stale_batch(28, [4], beta=0.0)
    batch.mask[:] = True
    spread = statistics.stdev(batch.rewards.tolist()) + 1e-4
    # At equal lengths T: GRPO divides by T and the spread, Dr. GRPO by LONGEST.
    ratio = LONGEST / batch.logps.shape[1] / spread
    assert close(batch.gradient("grpo"), ratio * batch.gradient("dr_grpo"))
    fresh = replace(batch, old=batch.logps)
    assert close(fresh.gradient("dr_grpo"), fresh.gradient("reinforce") / LONGEST)


def test_grpos_advantages_do_not_depend_on_the_rewards_scale() -> None:
    batch = stale_batch(29, [4, 3], beta=0.0)
    shifted = replace(batch, rewards=1e6 * batch.rewards - 3e6)
    large = replace(batch, rewards=1e6 * batch.rewards)  # where 1e-4 is nothing
    assert torch.allclose(shifted.gradient("grpo"), large.gradient("grpo"), rtol=1e-6)
