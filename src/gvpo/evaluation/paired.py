"""Two models on the same problems: is the difference more than luck? Pure functions, exact tests.

The null hypothesis of the tests: on every problem the two models' results could as well have been each other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

SIGNIFICANT = 0.05


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value for one completion a problem: McNemar 1947, with the binomial distribution.

    only_a, only_b: problems that only the one, or only the other, has right (discordant pairs). Under the null each
    falls to either side with chance 1/2: p = min(1, 2 P(X <= min)), X ~ Binomial(only_a + only_b, 1/2).
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def possible_p_values(right_a: int, right_b: int, problems: int) -> Iterator[tuple[int, int, float]]:
    """For totals alone: the discordant pairs there may have been, as (only_a, only_b, p), from the fewest to the most.

    The difference fixes only_a - only_b; how many problems both have right is not in the totals.
    """
    difference = right_a - right_b
    for only_b in range(max(0, -difference), min(right_b, problems - right_a) + 1):
        only_a = only_b + difference
        yield only_a, only_b, mcnemar(only_a, only_b)


def sign_flip_law(differences_P: Sequence[int]) -> np.ndarray:
    """The chance of every sum of the differences under random signs, from -S to S, S = sum of absolute differences.

    Exact but for float64's rounding of sums of positive numbers: one convolution a problem, all 2^P signs counted.
    """
    law = np.ones(1)
    for step in (abs(d) for d in differences_P if d):
        wider = np.zeros(len(law) + 2 * step)
        wider[: len(law)] = law / 2
        wider[2 * step :] += law / 2
        law = wider
    return law


def sign_flip(differences_P: Sequence[int]) -> float:
    """The exact two-sided p-value of a sum of per-problem differences, by flipping signs (Fisher 1935).

    differences_P: right completions of A less those of B, each of the same k. p = P(|random sum| >= |sum|). With
    k = 1 this is `mcnemar`.
    """
    return float(_two_sided(sign_flip_law(differences_P))[abs(sum(differences_P))])


def smallest_significant(differences_P: Sequence[int]) -> int | None:
    """The smallest sum of differences with p < SIGNIFICANT, had the problems differed as they did, but for the sign.

    None where no sum would be: with k = 1, fewer than six discordant pairs.
    """
    law = sign_flip_law(differences_P)
    possible = np.flatnonzero((law[len(law) // 2 :] > 0) & (_two_sided(law) < SIGNIFICANT))
    return int(possible[0]) if len(possible) else None


def _two_sided(law: np.ndarray) -> np.ndarray:
    """P(|random sum| >= s) for s from 0 to the largest sum, by symmetry."""
    p_values = 2 * np.cumsum(law[::-1])[len(law) // 2 :: -1]
    p_values[0] = 1.0
    return np.minimum(p_values, 1.0)
