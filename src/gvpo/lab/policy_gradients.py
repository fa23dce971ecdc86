"""GVPO's gradient in its three terms, and as a policy gradient (arXiv 2504.19599, the RL form; beta written out)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.claim import Claim, above, below, claim, shown
from gvpo.lab.expectation import ALL, draws_with_replacement, expected_components, expected_loss, expected_surrogate
from gvpo.lab.policies import Problem, Table, autoregressive_table, random_logits, random_problem, softmax_table

BETA = 0.3
TABLES = {"softmax": softmax_table(12), "autoregressive": autoregressive_table(3, 3)}


class Gradients(NamedTuple):
    """Gradients with respect to a table's logits; relative gaps are to the largest entry of the whole gradient."""

    whole: Tensor
    weighted: Tensor
    terms: dict[str, Tensor]
    on_policy: Tensor
    constrained: Tensor
    at_reference: dict[str, Tensor]
    value_gap: float  # of the terms with their constant, relative to the loss


def measure() -> dict[str, Gradients]:
    """A stale policy on both tables."""
    return {name: _measure(table) for name, table in TABLES.items()}


def claims(measured: dict[str, Gradients]) -> list[Claim]:
    """The terms add up; on-policy they are a policy gradient; at the reference two of them cancel."""
    results = measured.values()
    sums = [_gap(torch.stack(list(g.terms.values())).sum(0), g.whole) for g in results]
    shares = [float(term.abs().max() / g.whole.abs().max()) for g in results for term in g.terms.values()]
    return [
        claim(
            "policy-gradients/components",
            "Advantage, covariance with the reference and variance add up to GVPO's gradient, and with their constant "
            "to its loss; so do the weights to the gradient.",
            below("gap of the three terms", max(sums), 1e-10),
            below("gap of the weights", max(_gap(g.weighted, g.whole) for g in results), 1e-10),
            below("gap of the loss", max(g.value_gap for g in results), 1e-10),
            above("smallest term's share", min(shares), 0.01),
        ),
        claim(
            "policy-gradients/on-policy",
            "Sampled from the policy itself, GVPO's gradient over beta is that of -(E[R] - beta KL(pi || pi_ref)).",
            below("relative gap", max(_gap(g.on_policy / BETA, g.constrained) for g in results), 1e-10),
        ),
        claim(
            "policy-gradients/cancelling",
            "At the reference the covariance and variance gradients cancel: beta does not show in a first update.",
            below("gap", max(_gap(-g.at_reference["ref_cov"], g.at_reference["var"]) for g in results), 1e-10),
            shown("size of each", min(float(g.at_reference["var"].abs().max()) for g in results)),
        ),
    ]


def slope(table: Table, loss_of: Callable[[Tensor], Tensor], logits_E: Tensor) -> Tensor:
    """Gradient of a loss of the answers' log-probs with respect to the logits."""
    leaf_E = logits_E.clone().requires_grad_()
    return torch.autograd.grad(loss_of(table.logps(leaf_E)), leaf_E)[0]


def _measure(table: Table) -> Gradients:
    problem, logits_E = random_problem(table, seed=6, beta=BETA), random_logits(table, seed=8, scale=2.0)
    draws = draws_with_replacement(random_logits(table, seed=9, scale=0.5)[: len(table.answers)].softmax(0), 3)
    fresh = draws_with_replacement(table.logps(logits_E).exp(), 2)
    start_E = random_logits(table, seed=6, scale=1.0)
    start = Problem(table.logps(start_E), problem.rewards_A, BETA)
    factors = {"reward_cov": -BETA, "ref_cov": -(BETA**2), "var": BETA**2 / 2}

    def term(name: str, problem: Problem, at_E: Tensor) -> Tensor:
        return slope(table, lambda logps_A: factors[name] * expected_components(logps_A, problem, draws)[name], at_E)

    logps_A = table.logps(logits_E)
    moments = expected_components(logps_A, problem, draws)
    total = float(moments["constant"] + sum(factor * moments[name] for name, factor in factors.items()))
    return Gradients(
        slope(table, lambda logps_A: expected_loss(logps_A, problem, draws), logits_E),
        slope(table, lambda logps_A: expected_surrogate(logps_A, problem, draws, ALL), logits_E),
        {name: term(name, problem, logits_E) for name in factors},
        slope(table, lambda logps_A: expected_loss(logps_A, problem, fresh), logits_E),
        slope(table, lambda logps_A: -constrained_reward(logps_A, problem), logits_E),
        {name: term(name, start, start_E) for name in ("ref_cov", "var")},
        abs(total / float(expected_loss(logps_A, problem, draws)) - 1),
    )


def constrained_reward(logps_A: Tensor, problem: Problem) -> Tensor:
    """E[R] - beta KL(pi || pi_ref), with its graph."""
    return (logps_A.exp() * (problem.rewards_A - problem.beta * (logps_A - problem.reference_A))).sum()


def _gap(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())
