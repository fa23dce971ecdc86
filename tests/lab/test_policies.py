"""Finite policies against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from gvpo.lab.policies import (
    Problem,
    autoregressive_table,
    entropy,
    kl,
    mean,
    random_logits,
    random_problem,
    softmax_table,
    spread,
    total_variation,
    variance,
)


def logs(*probs: float) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def test_a_softmax_table_is_a_softmax() -> None:
    table = softmax_table(3)
    assert table.answers == ((0,), (1,), (2,)) and table.entries == 3
    # exp(0), exp(log 2), exp(log 5) over 8.
    logps_A = table.logps(torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64))
    torch.testing.assert_close(logps_A.exp(), torch.tensor([1, 2, 5], dtype=torch.float64) / 8)


def test_an_autoregressive_table_by_hand() -> None:
    # One word 0 and the end 1, at most two tokens: cut off (0, 0); ended (0, 1) and (1,).
    table = autoregressive_table(2, 2)
    assert table.answers == ((0, 0), (0, 1), (1,)) and table.entries == 4
    # The first row gives the word 1/4 and the end 3/4; the second, after the word, 2/3 and 1/3.
    logits_E = torch.tensor([0.0, math.log(3), math.log(2), 0.0], dtype=torch.float64)
    expected_A = torch.tensor([1 / 4 * 2 / 3, 1 / 4 * 1 / 3, 3 / 4], dtype=torch.float64)
    torch.testing.assert_close(table.logps(logits_E).exp(), expected_A)


@pytest.mark.parametrize(("vocabulary", "longest"), [(2, 1), (3, 3), (4, 2), (2, 5)])
def test_probabilities_of_all_sequences_sum_to_one(vocabulary: int, longest: int) -> None:
    table, words = autoregressive_table(vocabulary, longest), vocabulary - 1
    ended, cut_off = sum(words**length for length in range(longest)), words**longest
    assert len(set(table.answers)) == len(table.answers) == ended + cut_off
    assert all(vocabulary - 1 not in answer[:-1] for answer in table.answers)
    total = table.logps(random_logits(table, seed=0, scale=3.0)).exp().sum()
    assert total.dtype == torch.float64 and float(total) == pytest.approx(1.0, abs=1e-14)


def test_the_optimum_by_hand() -> None:
    # Reference (1/2, 1/2), rewards (0, 1), beta = 1 / log 3: tilted by 1 and 3.
    problem = Problem(logs(0.5, 0.5), torch.tensor([0.0, 1.0], dtype=torch.float64), 1 / math.log(3))
    torch.testing.assert_close(problem.optimum(), logs(0.25, 0.75))


def test_the_optimum_maximises_the_constrained_reward() -> None:
    problem = random_problem(softmax_table(6), seed=0, beta=0.3)

    def value(logp_A: torch.Tensor) -> float:
        return mean(logp_A.exp(), problem.rewards_A) - problem.beta * kl(logp_A, problem.reference_A)

    best = value(problem.optimum())
    for seed in range(50):
        other = random_logits(softmax_table(6), seed=seed, scale=1.0).log_softmax(0)
        assert value(other) < best
        # The gap is beta KL(pi || pi*), exactly.
        assert best - value(other) == pytest.approx(problem.beta * kl(other, problem.optimum()), rel=1e-9)


def test_distances_by_hand() -> None:
    one, two = logs(0.5, 0.5), logs(0.25, 0.75)
    assert total_variation(one, two) == pytest.approx(0.25)
    assert kl(one, two) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl(two, one) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert entropy(one) == pytest.approx(math.log(2))
    values_A = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert mean(two.exp(), values_A) == pytest.approx(3.0)
    assert variance(two.exp(), values_A) == pytest.approx(0.25 * 9 + 0.75 * 1)
    assert spread(values_A) == 4.0
