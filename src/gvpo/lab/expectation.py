"""Exact expectations of the library's own objective over every group that can be drawn.

Shapes: A answers, P groups, N members laid end to end. Every number comes from `gvpo.objective`, called by its module,
so that the claims judge what training runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo import objective
from gvpo.lab.policies import Problem, variance

ALL = ("reward", "covariance", "variance")


class Draws(NamedTuple):
    """Every group that can be drawn, and how likely it is."""

    answers_N: Tensor  # which answer each member is
    group_ids_N: Tensor  # 0..P-1
    probs_P: Tensor

    def degrees(self) -> Tensor:
        """k - 1 of each group."""
        return torch.bincount(self.group_ids_N) - 1


def draws_with_replacement(sampling_A: Tensor, k: int) -> Draws:
    """All groups of k independent draws. Order does not matter to a loss: a group stands for all its orders."""
    groups_PG, orders_P = _multisets(len(sampling_A), k)
    return _draws(groups_PG, orders_P * sampling_A[groups_PG].prod(1))


def distinct_draws(sampling_A: Tensor, k: int) -> Draws:
    """All ordered groups of k different answers, each drawn from what the draws before it left."""
    groups_PG = torch.tensor(list(itertools.permutations(range(len(sampling_A)), k)))
    probs_PG = sampling_A[groups_PG]
    left_PG = 1.0 - (probs_PG.cumsum(1) - probs_PG)
    return _draws(groups_PG, (probs_PG / left_PG).prod(1))


def mixture(parts: Sequence[Draws], shares: Sequence[float]) -> Draws:
    """Groups of one kind or another, each kind with its share."""
    offsets = itertools.accumulate((len(part.probs_P) for part in parts), initial=0)
    return Draws(
        torch.cat([part.answers_N for part in parts]),
        torch.cat([part.group_ids_N + offset for part, offset in zip(parts, offsets, strict=False)]),
        torch.cat([share * part.probs_P for part, share in zip(parts, shares, strict=True)]),
    )


def expected_loss(logps_A: Tensor, problem: Problem, draws: Draws) -> Tensor:
    """E[gvpo_loss], with its graph.

    The loss of a group is quadratic in (l, r, R) together: scaled by the root of what a group weighs in the mean over
    groups, one call of the library's loss is the expectation.
    """
    return objective.gvpo_loss(*_weighted(logps_A, problem, draws), draws.group_ids_N, beta=problem.beta)


def expected_components(logps_A: Tensor, problem: Problem, draws: Draws) -> dict[str, Tensor]:
    """E[gvpo_components], with their graphs; quadratic too."""
    return objective.gvpo_components(*_weighted(logps_A, problem, draws), draws.group_ids_N, beta=problem.beta)


def expected_surrogate(logps_A: Tensor, problem: Problem, draws: Draws, components: Collection[str] = ALL) -> Tensor:
    """E[-(beta / (k - 1)) sum_i w_i l_i] with the weights of `gvpo_weights`: its gradient is the objective's."""
    weights_N = group_weights(logps_A, problem, draws, components)
    shares_P = draws.probs_P / draws.degrees()
    return -problem.beta * (shares_P[draws.group_ids_N] * weights_N * logps_A[draws.answers_N]).sum()


def group_weights(logps_A: Tensor, problem: Problem, draws: Draws, components: Collection[str] = ALL) -> Tensor:
    """`gvpo_weights` of every member of every group."""
    columns = member_columns(logps_A, problem, draws.answers_N)
    return objective.gvpo_weights(*columns, draws.group_ids_N, beta=problem.beta, components=components)


def member_columns(logps_A: Tensor, problem: Problem, answers_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, reference log-probs and rewards of members, as the objective takes them."""
    return logps_A[answers_N], problem.reference_A[answers_N], problem.rewards_A[answers_N]


def half_variance(logps_A: Tensor, problem: Problem, sampling_A: Tensor) -> float:
    """1/2 Var(beta (l - r) - R) under the sampling law: what the loss must be, without calling the library."""
    return 0.5 * variance(sampling_A, problem.beta * (logps_A - problem.reference_A) - problem.rewards_A)


def _weighted(logps_A: Tensor, problem: Problem, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    scale_N = (draws.probs_P * len(draws.probs_P)).sqrt()[draws.group_ids_N]
    logps_N, refs_N, rewards_N = member_columns(logps_A, problem, draws.answers_N)
    return scale_N * logps_N, scale_N * refs_N, scale_N * rewards_N


def _draws(groups_PG: Tensor, probs_P: Tensor) -> Draws:
    count, k = groups_PG.shape
    return Draws(groups_PG.flatten(), torch.arange(count).repeat_interleave(k), probs_P)


@functools.cache
def _multisets(answers: int, k: int) -> tuple[Tensor, Tensor]:
    """Every multiset of k answers, and in how many orders it can be drawn."""
    groups = list(itertools.combinations_with_replacement(range(answers), k))
    orders = [math.factorial(k) / math.prod(math.factorial(group.count(a)) for a in set(group)) for group in groups]
    return torch.tensor(groups), torch.tensor(orders, dtype=torch.float64)
