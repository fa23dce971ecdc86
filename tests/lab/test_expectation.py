"""Expectations against hand arithmetic and against draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gvpo.lab.expectation import (
    distinct_draws,
    draws_with_replacement,
    expected_components,
    expected_loss,
    expected_surrogate,
    half_variance,
    mixture,
)
from gvpo.lab.policies import Problem, random_logits, random_problem, softmax_table
from gvpo.objective import gvpo_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two answers; l - r = (1, -1), R = (0, 1), beta = 1/2: implicit reward less reward is (1/2, -3/2).
PROBLEM, LOGPS_A = Problem(tensor(-4, -4), tensor(0, 1), 0.5), tensor(-3, -5)
LAW_A = tensor(0.25, 0.75)


def test_draws_with_replacement_by_hand() -> None:
    draws = draws_with_replacement(LAW_A, 2)
    assert draws.answers_N.tolist() == [0, 0, 0, 1, 1, 1] and draws.group_ids_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert draws.probs_P.tolist() == [1 / 16, 6 / 16, 9 / 16]  # (0, 1) in either order
    assert draws.degrees().tolist() == [1, 1, 1]


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16])
def test_probabilities_of_groups_sum_to_one(k: int) -> None:
    assert float(draws_with_replacement(tensor(0.5, 0.3, 0.2), k).probs_P.sum()) == pytest.approx(1.0, abs=1e-12)


def test_distinct_draws_by_hand() -> None:
    draws = distinct_draws(tensor(0.5, 0.3, 0.2), 2)
    first = {tuple(pair): float(p) for pair, p in zip(draws.answers_N.view(-1, 2).tolist(), draws.probs_P, strict=True)}
    assert first[(0, 1)] == pytest.approx(0.5 * 0.3 / 0.5) and first[(1, 0)] == pytest.approx(0.3 * 0.5 / 0.7)
    assert sum(first.values()) == pytest.approx(1.0) and len(first) == 6


def test_the_expected_loss_by_hand() -> None:
    # Only the pair (0, 1) has a loss: residuals (1, -1), so (1 + 1) / 2 = 1, drawn with 6/16. Half the variance of
    # (1/2, -3/2) under (1/4, 3/4) is half of 4 * 3/16.
    assert float(expected_loss(LOGPS_A, PROBLEM, draws_with_replacement(LAW_A, 2))) == pytest.approx(0.375)
    assert half_variance(LOGPS_A, PROBLEM, LAW_A) == pytest.approx(0.375)


def stale() -> tuple[Problem, Tensor, Tensor]:
    table = softmax_table(4)
    law_A = random_logits(table, seed=5, scale=1.0).softmax(0)
    return random_problem(table, seed=1, beta=0.3), table.logps(random_logits(table, seed=2, scale=5.0)), law_A


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_expected_loss_is_a_sum_over_ordered_groups(k: int) -> None:
    problem, logps_A, law_A = stale()
    total = 0.0
    for group in itertools.product(range(4), repeat=k):
        at = torch.tensor(group)
        columns = (logps_A[at], problem.reference_A[at], problem.rewards_A[at])
        total += float(law_A[at].prod() * gvpo_loss(*columns, torch.zeros(k, dtype=torch.long), beta=problem.beta))
    assert float(expected_loss(logps_A, problem, draws_with_replacement(law_A, k))) == pytest.approx(total, rel=1e-12)


def test_components_and_surrogate_agree_with_the_loss() -> None:
    problem, logps_A, law_A = stale()
    draws = mixture([draws_with_replacement(law_A, 2), draws_with_replacement(law_A, 5)], [0.7, 0.3])
    beta, moments = problem.beta, expected_components(logps_A, problem, draws)
    value = -beta * moments["reward_cov"] - beta**2 * moments["ref_cov"] + beta**2 / 2 * moments["var"]
    loss = expected_loss(logps_A, problem, draws)
    assert float(value + moments["constant"]) == pytest.approx(float(loss), rel=1e-12)

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        leaf = logps_A.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, problem, draws), leaf)[0]

    torch.testing.assert_close(gradient(expected_surrogate), gradient(expected_loss), rtol=1e-12, atol=1e-14)


def test_a_mixture_weighs_its_parts() -> None:
    problem, logps_A, law_A = stale()
    parts = [distinct_draws(law_A, 2), draws_with_replacement(law_A, 3)]
    losses = [float(expected_loss(logps_A, problem, part)) for part in parts]
    both = mixture(parts, [0.25, 0.75])
    assert float(both.probs_P.sum()) == pytest.approx(1.0)
    assert float(expected_loss(logps_A, problem, both)) == pytest.approx(0.25 * losses[0] + 0.75 * losses[1])
