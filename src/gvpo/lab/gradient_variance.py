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
from gvpo.lab.policies import Problem, kl, spread, variance

ANSWERS, BETA, RANGE = 20, 0.3, 10.0
PATH = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Moved(NamedTuple):
    """By place on the path: how far policy and law are apart, both variances and what bounds them.

    Each weight of GVPO is at most half the range of R - beta (l - r), and two scores differ by a vector of squared
    length at most 2: its variance is at most half the squared range. The weighted one's is at most the ratio's second
    moment times the largest squared advantage (a score has squared length at most 2, and two draws are averaged).
    """

    divergence: list[float]  # KL(pi || pi_s), nats
    gvpo: list[float]
    weighted: list[float]
    gvpo_bound: list[float]
    weighted_bound: list[float]
    second_moment: list[float]  # of the ratio pi / pi_s
    log_ratio: list[float]  # variance of beta log(pi / pi_ref) under pi_s


def measure() -> dict[str, Moved]:
    """The sampling law moves away from a policy that stays; the policy drifts from a reference that samples.

    Both go from the reference, likely and unlikely answers 10 nats apart, to its reversal: the entropy at the end is
    that at the start, so that no variance vanishes because a law does.
    """
    logits_A = -RANGE * torch.linspace(0, 1, ANSWERS, dtype=torch.float64)
    rewards_A = torch.rand(ANSWERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = Problem(logits_A.log_softmax(0), rewards_A, BETA)
    moved = [((1 - 2 * place) * logits_A).log_softmax(0) for place in PATH]
    return {
        "sampling moves": _measure(problem, [(problem.reference_A, law_A) for law_A in moved]),
        "policy drifts": _measure(problem, [(policy_A, problem.reference_A) for policy_A in moved]),
    }


def claims(measured: dict[str, Moved]) -> list[Claim]:
    """Two tables, as they are."""
    moves, drifts = measured["sampling moves"], measured["policy drifts"]
    per_log_ratio = [a / b for a, b in zip(drifts.gvpo[1:], drifts.log_ratio[1:], strict=True)][len(PATH) // 2 - 1 :]
    return [
        claim(
            "policy-gradients/sampling-moves",
            "The sampling law moves away from the policy, up to its reversal: the variance of GVPO's gradient stays "
            "bounded, that of the importance-weighted one explodes.",
            below("GVPO's largest by bound", _largest_ratio(moves.gvpo, moves.gvpo_bound), 1.0),
            below("GVPO's growth", _growth(moves.gvpo), 10.0),
            above("weighted's growth", _growth(moves.weighted), 1000.0),
            shown("KL(pi || pi_s), nats", moves.divergence),
            shown("GVPO", moves.gvpo),
            shown("weighted", moves.weighted),
        ),
        claim(
            "policy-gradients/policy-drifts",
            "The policy drifts from the reference, which samples, up to its reversal: GVPO's variance grows like that "
            "of beta times the log-ratio; the weighted one's by orders of magnitude more, under a bound by the ratio's "
            "second moment.",
            below("spread of GVPO by Var", max(per_log_ratio) / min(per_log_ratio), 1.5),
            below("weighted's largest by bound", _largest_ratio(drifts.weighted, drifts.weighted_bound), 1.0),
            above("weighted's growth by GVPO's", _growth(drifts.weighted) / _growth(drifts.gvpo), 1000.0),
            shown("KL(pi || pi_ref), nats", drifts.divergence),
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
    returns_A = problem.rewards_A - log_ratio_A
    second_moment = float(law_A.exp() @ ratio_A**2)
    return (
        kl(policy_A, law_A),
        gvpo_variance(problem, policy_A, law_A.exp()),
        weighted_variance(problem, policy_A, law_A.exp()),
        spread(returns_A) ** 2 / 2,
        second_moment * float(((returns_A - policy_A.exp() @ returns_A) ** 2).max()),
        second_moment,
        variance(law_A.exp(), log_ratio_A),
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


def _largest_ratio(values: list[float], bounds: list[float]) -> float:
    return max(value / bound for value, bound in zip(values, bounds, strict=True))


def _growth(values: list[float]) -> float:
    return max(values) / values[0]
