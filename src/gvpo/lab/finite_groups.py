"""Finite groups: what the loss of k draws is on average (arXiv 2504.19599, the Bessel-corrected empirical loss)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo import objective
from gvpo.lab.claim import Claim, above, below, claim, near, shown
from gvpo.lab.expectation import (
    Draws,
    distinct_draws,
    draws_with_replacement,
    expected_loss,
    half_variance,
    member_columns,
    mixture,
)
from gvpo.lab.policies import Problem, random_logits, random_problem, softmax_table

SIZES = range(2, 17)
SHARES = {2: 0.4, 3: 0.3, 7: 0.2, 16: 0.1}
MIXED = "/".join(f"{share:.0%}" for share in SHARES.values())
LAW_A = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
"""Answer 0 as often as the two others together: groups can be listed, each as often as it is drawn."""


class FiniteGroups(NamedTuple):
    """Ratios of an expected loss to half the variance, except where said."""

    by_size: dict[int, float]
    uncorrected: dict[int, float]
    ragged: float
    listed: float
    distinct_uniform: dict[int, float]
    distinct_law: dict[int, float]


def measure() -> FiniteGroups:
    """A stale policy on three answers, and on five for distinct draws."""
    problem, logps_A = _stale(3)
    truth = half_variance(logps_A, problem, LAW_A)
    by_size = {k: draws_with_replacement(LAW_A, k) for k in SIZES}
    losses = {k: float(expected_loss(logps_A, problem, draws)) for k, draws in by_size.items()}
    ragged = mixture([by_size[k] for k in SHARES], list(SHARES.values()))
    five, five_logps_A = _stale(5)
    uniform_A = torch.full((5,), 0.2, dtype=torch.float64)
    skewed_A = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    return FiniteGroups(
        {k: loss / truth for k, loss in losses.items()},
        {k: _uncorrected(logps_A, problem, draws) / truth for k, draws in by_size.items()},
        float(expected_loss(logps_A, problem, ragged)) / truth,
        _listed_loss(logps_A, problem) / truth,
        {k: _distinct(five_logps_A, five, uniform_A, k) for k in (2, 3, 4, 5)},
        {k: _distinct(five_logps_A, five, skewed_A, k) for k in (2, 3, 4, 5)},
    )


def claims(measured: FiniteGroups) -> list[Claim]:
    """Unbiased with replacement, whatever the sizes; biased without the correction, and for distinct draws."""
    sizes = f"k = {SIZES[0]}..{SIZES[-1]}"
    gaps = [abs(ratio - 1) for ratio in measured.by_size.values()]
    uncorrected = [abs(ratio - (k - 1) / k) for k, ratio in measured.uncorrected.items()]
    return [
        claim(
            "finite-groups/unbiased",
            f"Draws with replacement: E[gvpo_loss] is half the variance for {sizes}.",
            below("largest relative gap", max(gaps), 1e-10),
        ),
        claim(
            "finite-groups/ragged",
            f"The same for ragged groups: k = {', '.join(map(str, SHARES))} mixed {MIXED}.",
            below("relative gap", abs(measured.ragged - 1), 1e-10),
        ),
        claim(
            "finite-groups/plain-mean",
            "One plain call of gvpo_loss, members in any order: every group of 2 and of 3, each as often as it is "
            "drawn, and lone members, which count for nothing.",
            below("relative gap", abs(measured.listed - 1), 1e-10),
        ),
        claim(
            "finite-groups/uncorrected",
            f"With 1/k in place of 1/(k-1) the expectation is (k-1)/k of it, {sizes}.",
            below("largest gap to (k-1)/k", max(uncorrected), 1e-10),
            near("share kept at k = 2", measured.uncorrected[2], 0.5, 1e-10),
        ),
        claim(
            "finite-groups/distinct",
            "Counter-example: distinct draws are biased. Of n = 5 equally likely answers by n/(n-1), for every k; "
            "under a skewed law by an amount that depends on k (2, 3, 4, 5).",
            below("gap to 5/4, uniform", max(abs(r - 1.25) for r in measured.distinct_uniform.values()), 1e-10),
            above("bias at k = 2, skewed", abs(measured.distinct_law[2] - 1), 0.05),
            shown("ratio to truth, skewed", list(measured.distinct_law.values())),
        ),
    ]


def _stale(answers: int) -> tuple[Problem, Tensor]:
    """A problem and a policy some nats from its reference: on fresh data a wrong grouping is invisible."""
    table = softmax_table(answers)
    return random_problem(table, seed=2, beta=0.3), table.logps(random_logits(table, seed=4, scale=5.0))


def _uncorrected(logps_A: Tensor, problem: Problem, draws: Draws) -> float:
    k = len(draws.answers_N) // len(draws.probs_P)
    return float(expected_loss(logps_A, problem, draws)) * (k - 1) / k


def _distinct(logps_A: Tensor, problem: Problem, sampling_A: Tensor, k: int) -> float:
    loss = float(expected_loss(logps_A, problem, distinct_draws(sampling_A, k)))
    return loss / half_variance(logps_A, problem, sampling_A)


def _listed_loss(logps_A: Tensor, problem: Problem) -> float:
    """No probabilities at all: groups drawn from (0, 0, 1, 2), all of them; pairs as often as triples; lone members."""
    pairs = list(itertools.product([0, 0, 1, 2], repeat=2)) * 4
    groups = pairs + list(itertools.product([0, 0, 1, 2], repeat=3)) + [(0,), (2,)]
    answers_N = torch.tensor([answer for group in groups for answer in group])
    ids_N = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    order_N = torch.randperm(len(ids_N), generator=torch.Generator().manual_seed(0))
    columns = member_columns(logps_A, problem, answers_N[order_N])
    return float(objective.gvpo_loss(*columns, 5 - 3 * ids_N[order_N], beta=problem.beta))
