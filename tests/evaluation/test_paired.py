"""Paired tests against enumeration of all signs."""

from __future__ import annotations

import itertools
import random

import pytest
from scipy.stats import binomtest

from gvpo.evaluation.paired import mcnemar, possible_p_values, sign_flip, smallest_significant


def enumerated(differences: list[int], least: int) -> float:
    """P(|sum| >= least) over all 2^P signs."""
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(total >= least for total in sums) / len(sums)


@pytest.mark.parametrize("differences", [[], [0], [3], [1, -1], [1] * 8, [2, 2, -2, 0, 5], [-4, 1, 1, 3, -2, 7, 0, 1]])
def test_sign_flips_are_counted_all(differences: list[int]) -> None:
    assert sign_flip(differences) == pytest.approx(enumerated(differences, abs(sum(differences))), rel=1e-12)


def test_random_differences() -> None:
    draw = random.Random(0)
    for _ in range(30):
        differences = [draw.randint(-5, 5) for _ in range(draw.randint(1, 11))]
        assert sign_flip(differences) == pytest.approx(enumerated(differences, abs(sum(differences))), rel=1e-12)


def test_with_one_completion_it_is_mcnemars_test() -> None:
    for only_a, only_b in itertools.product(range(9), repeat=2):
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-12)
        assert sign_flip([1] * only_a + [-1] * only_b + [0] * 5) == pytest.approx(expected, rel=1e-12)


def test_many_problems() -> None:
    assert mcnemar(1000, 0) == 0.5**999
    assert sign_flip([1] * 500 + [-1] * 400) == pytest.approx(mcnemar(500, 400), rel=1e-9)
    assert sign_flip([32] * 300 + [-32] * 250) == pytest.approx(mcnemar(300, 250), rel=1e-9)


@pytest.mark.parametrize(
    "differences", [[1] * 5, [1] * 6, [1] * 7 + [-1] * 6, [2] * 6, [5, 1, 1, 1, 1, 1, 1], [4, 4, 3, 2, 2, 1, 1, 1], []]
)
def test_the_smallest_significant_sum_is_the_first_that_enumeration_finds(differences: list[int]) -> None:
    magnitudes = [abs(d) for d in differences]
    reachable = {
        abs(sum(sign * d for sign, d in zip(signs, magnitudes, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(magnitudes))
    }
    significant = [total for total in sorted(reachable) if enumerated(magnitudes, total) < 0.05]
    assert smallest_significant(differences) == (significant[0] if significant else None)


def test_five_discordant_problems_can_show_nothing() -> None:
    assert smallest_significant([1] * 5) is None
    assert smallest_significant([1, 1, 1, -1, -1, -1]) == 6


@pytest.mark.parametrize(("right_a", "right_b", "problems"), [(3, 1, 4), (1, 3, 4), (2, 2, 5), (4, 0, 4), (5, 3, 5)])
def test_possible_p_values_are_those_of_all_pairings(right_a: int, right_b: int, problems: int) -> None:
    ids = range(problems)
    seen = set()
    for one in itertools.combinations(ids, right_a):
        for other in itertools.combinations(ids, right_b):
            seen.add((len(set(one) - set(other)), len(set(other) - set(one))))
    found = list(possible_p_values(right_a, right_b, problems))
    assert [(only_a, only_b) for only_a, only_b, _ in found] == sorted(seen)
    assert all(p == mcnemar(only_a, only_b) for only_a, only_b, p in found)
