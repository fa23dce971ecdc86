"""Theorem 1: the loss has one minimiser, and it is pi* (arXiv 2504.19599, Theorem 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gvpo.lab.claim import Claim, above, below, claim
from gvpo.lab.descent import Descent, minimise_gvpo
from gvpo.lab.expectation import draws_with_replacement, expected_loss, half_variance
from gvpo.lab.policies import (
    Problem,
    Table,
    autoregressive_table,
    random_logits,
    random_problem,
    softmax_table,
    total_variation,
)

STARTS, OTHERS, BETA = 20, 1000, 0.3
TABLES = {"softmax": softmax_table(12), "autoregressive": autoregressive_table(3, 3)}
"""One choice among 12 answers; sequences of at most 3 tokens from 2 words and an end: 15 answers."""


class Uniqueness(NamedTuple):
    """For one table: the descents, and the loss of pi* and of policies elsewhere, the formula's beside it."""

    problem: Problem
    descents: list[Descent]
    loss_at_optimum: float
    losses_elsewhere: list[float]
    formula_elsewhere: list[float]

    def distances(self) -> list[float]:
        """Total variation to pi* at the end of each descent."""
        return [total_variation(descent.policy, self.problem.optimum()) for descent in self.descents]


def measure() -> dict[str, Uniqueness]:
    """Both tables, sampled from the reference."""
    return {name: _measure(table) for name, table in TABLES.items()}


def claims(measured: dict[str, Uniqueness]) -> list[Claim]:
    """Theorem 1, table by table."""
    found = []
    for name, result in measured.items():
        gaps = [abs(a / b - 1) for a, b in zip(result.losses_elsewhere, result.formula_elsewhere, strict=True)]
        found += [
            claim(
                f"uniqueness/{name}",
                f"From {STARTS} random starts the minimiser is pi* = pi_ref exp(R/beta)/Z.",
                below("largest TV to pi*", max(result.distances()), 1e-6),
            ),
            claim(
                f"uniqueness/{name}-positive",
                f"The loss is zero at pi* and positive at any other policy: {OTHERS} of them, near and far. It is half "
                "the variance of implicit reward less reward.",
                below("loss at pi*", result.loss_at_optimum, 1e-20),
                above("smallest loss elsewhere", min(result.losses_elsewhere), 1e-12),
                below("relative gap to formula", max(gaps), 1e-9),
            ),
        ]
    return found


def _measure(table: Table) -> Uniqueness:
    problem = random_problem(table, seed=0, beta=BETA)
    sampling_A = problem.reference_A.exp()
    draws = draws_with_replacement(sampling_A, 2)
    starts = [random_logits(table, seed=seed, scale=1.5) for seed in range(STARTS)]
    others = [_elsewhere(problem, seed) for seed in range(OTHERS)]
    return Uniqueness(
        problem,
        [minimise_gvpo(table, problem, sampling_A, start_E) for start_E in starts],
        float(expected_loss(problem.optimum(), problem, draws)),
        [float(expected_loss(logps_A, problem, draws)) for logps_A in others],
        [half_variance(logps_A, problem, sampling_A) for logps_A in others],
    )


def _elsewhere(problem: Problem, seed: int) -> torch.Tensor:
    """pi* with its log-probs moved at random, by 3 nats down to 0.0003."""
    generator = torch.Generator().manual_seed(seed)
    moves_A = torch.randn(len(problem.rewards_A), generator=generator, dtype=torch.float64)
    return (problem.optimum() + 3.0 * 10.0 ** -(seed % 5) * moves_A).log_softmax(0)
