"""Off-policy: the variance of GVPO's gradient estimate beside that of an importance-weighted policy gradient.

Both estimate from groups of two draws, in the same unit (gradient of E[R] - beta KL with respect to the logits); both
variances are exact sums. The weighted estimate gets the best constant baseline there is to know, the exact mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.claim import Claim, above, below, claim, shown
from gvpo.lab.expectation import draws_with_replacement, group_weights
from gvpo.lab.policies import Problem, random_problem, softmax_table, spread, variance

ANSWERS, BETA = 20, 0.3
DISTANCES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
TABLE = softmax_table(ANSWERS)


class Moved(NamedTuple):
    """By distance: both variances, the ratio's second moment, the variance of beta times the log-ratio to the reference,
    and the bound of GVPO's variance, half the squared range of R - beta (l - r)."""

    gvpo: list[float]
    weighted: list[float]
    second_moment: list[float]
    log_ratio: list[float]
    bound: list[float]


def measure() -> dict[str, Moved]:
    """The sampling law moves away from a policy that stays; the policy drifts from a reference that samples."""
    problem = random_problem(TABLE, seed=13, beta=BETA)
    way_A = torch.randn(ANSWERS, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    reference_A = problem.reference_A
    moved = [(reference_A + d * way_A).log_softmax(0) for d in DISTANCES]
    return {
        "sampling moves": _measure(problem, [(reference_A, law_A) for law_A in moved]),
        "policy drifts": _measure(problem, [(policy_A, reference_A) for policy_A in moved]),
    }


def claims(measured: dict[str, Moved]) -> list[Claim]:
    """Two tables, as they are."""
    moves, drifts = measured["sampling moves"], measured["policy drifts"]
    per_log_ratio = [a / b for a, b in zip(drifts.gvpo, drifts.log_ratio, strict=True) if b > 1.0]
    headroom = max(a / b for a, b in zip(moves.gvpo, moves.bound, strict=True))
    return [
        claim(
            "policy-gradients/sampling-moves",
            "The sampling law moves away from the policy: the variance of GVPO's gradient stays bounded, that of the "
            f"importance-weighted one explodes. Distance {_list(DISTANCES)}.",
            below("GVPO's by its bound", headroom, 1.0 + 1e-9),
            below("GVPO's growth", max(moves.gvpo) / moves.gvpo[0], 10.0),
            above("weighted's growth", moves.weighted[-1] / moves.weighted[0], 1000.0),
            shown("GVPO", moves.gvpo),
            shown("weighted", moves.weighted),
        ),
        claim(
            "policy-gradients/policy-drifts",
            "The policy drifts from the reference, which samples: GVPO's variance grows like that of beta times the "
            f"log-ratio, the weighted one's with the ratio's second moment. Distance {_list(DISTANCES)}.",
            below("spread of GVPO by Var", max(per_log_ratio) / min(per_log_ratio), 2.0),
            shown("GVPO", drifts.gvpo),
            shown("Var(beta log-ratio)", drifts.log_ratio),
            shown("weighted", drifts.weighted),
            shown("E[ratio^2]", drifts.second_moment),
        ),
    ]


def _measure(problem: Problem, places: list[tuple[Tensor, Tensor]]) -> Moved:
    columns = [_at(problem, policy_A, law_A) for policy_A, law_A in places]
    return Moved(*(list(column) for column in zip(*columns, strict=True)))


def _at(problem: Problem, policy_A: Tensor, law_A: Tensor) -> tuple[float, ...]:
    ratio_A = (policy_A - law_A).exp()
    log_ratio_A = problem.beta * (policy_A - problem.reference_A)
    return (
        gvpo_variance(problem, policy_A, law_A.exp()),
        weighted_variance(problem, policy_A, law_A.exp()),
        float(law_A.exp() @ ratio_A**2),
        variance(law_A.exp(), log_ratio_A),
        spread(problem.rewards_A - log_ratio_A) ** 2 / 2,
    )


def gvpo_variance(problem: Problem, policy_A: Tensor, law_A: Tensor) -> float:
    """Total variance of sum_i w_i grad l_i over pairs, the weights the library's."""
    draws = draws_with_replacement(law_A, 2)
    weights_N = group_weights(policy_A, problem, draws)
    terms_NA = weights_N[:, None] * _scores(policy_A)[draws.answers_N]
    gradients_PA = torch.zeros(len(draws.probs_P), ANSWERS, dtype=torch.float64)
    return _total_variance(draws.probs_P, gradients_PA.index_add(0, draws.group_ids_N, terms_NA))


def weighted_variance(problem: Problem, policy_A: Tensor, law_A: Tensor) -> float:
    """Total variance of the mean of two terms (pi / pi_s) (A - E A) grad l, A = R - beta (l - r)."""
    returns_A = problem.rewards_A - problem.beta * (policy_A - problem.reference_A)
    probs_A = policy_A.exp()
    factors_A = probs_A / law_A * (returns_A - probs_A @ returns_A)
    return _total_variance(law_A, factors_A[:, None] * _scores(policy_A)) / 2


def _scores(policy_A: Tensor) -> Tensor:
    """grad log pi(y) with respect to the logits, one row an answer."""
    return torch.eye(ANSWERS, dtype=torch.float64) - policy_A.exp()


def _total_variance(probs_P: Tensor, gradients_PA: Tensor) -> float:
    mean_A = probs_P @ gradients_PA
    return float(probs_P @ ((gradients_PA - mean_A) ** 2).sum(1))


def _list(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
