"""Estimators against enumeration: every subset, every draw, every resample that there is."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from gvpo.evaluation import estimators
from gvpo.evaluation.estimators import (
    doublings,
    interval,
    majority,
    mean_at_k,
    mean_pass_at,
    pass_at,
    percentiles,
    resampled_means,
    wilson,
)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_pass_at_is_the_share_of_all_subsets_with_a_right_one(k: int) -> None:
    for right in range(k + 1):
        members = [True] * right + [False] * (k - right)
        for j in range(1, k + 1):
            subsets = list(itertools.combinations(members, j))
            assert pass_at(j, right, k) == Fraction(sum(map(any, subsets)), len(subsets))


def test_pass_at_is_unbiased() -> None:
    """Over all outcomes of k draws, each right with chance 1/3, it is 1 - (2/3)^j on average, exactly."""
    k, chance = 6, Fraction(1, 3)
    for j in range(1, k + 1):
        expected = sum(
            math.comb(k, right) * chance**right * (1 - chance) ** (k - right) * pass_at(j, right, k)
            for right in range(k + 1)
        )
        assert expected == 1 - (1 - chance) ** j


def test_large_counts_stay_exact() -> None:
    # The first factor of C(9999, 5000) / C(10000, 5000) is 1/2.
    assert pass_at(5000, 1, 10_000) == Fraction(1, 2)
    assert pass_at(10_000, 1, 10_000) == 1
    assert mean_pass_at(2, [1, 9_999], 10_000) == float(Fraction(1, 2) * (Fraction(2, 10_000) + 1))


def test_means() -> None:
    assert mean_at_k([0, 1, 3], 4) == 4 / 12
    assert mean_pass_at(1, [0, 1, 3], 4) == 4 / 12
    assert mean_pass_at(4, [0, 1, 3], 4) == 2 / 3


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_doublings(k: int, expected: list[int]) -> None:
    assert doublings(k) == expected


@pytest.mark.parametrize(
    ("votes", "right", "expected"),
    [
        ([0, 0, 1], [True, True, False], Fraction(1)),
        ([0, 1, 1], [True, False, False], Fraction(0)),
        ([0, 1], [True, False], Fraction(1, 2)),
        ([0, 1, 2, 0, 1, 2], [True, False, False] * 2, Fraction(1, 3)),
        ([None, None, None, 0], [False, False, False, True], Fraction(1)),
        ([None, None], [True, False], Fraction(0)),
        ([], [], Fraction(0)),
        ([0], [True], Fraction(1)),
        # Equal answers, judged by more than the answer: one of the two is right.
        ([0, 0, 1], [True, False, False], Fraction(1, 2)),
    ],
)
def test_majority(votes: list[int | None], right: list[bool], expected: Fraction) -> None:
    assert majority(votes, right) == expected


def test_resampled_means_have_the_law_of_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "RESAMPLES", 200_000)
    values = [0.0, 0.25, 0.25, 1.0]
    every = [sum(resample) / 4 for resample in itertools.product(values, repeat=4)]
    drawn = resampled_means(values, 0)
    for mean in set(every):
        share = sum(one == mean for one in every) / len(every)
        # Five standard errors of a share of 200,000 draws.
        assert abs(np.mean(np.isclose(drawn, mean)) - share) < 5 * math.sqrt(share * (1 - share) / 200_000)


def test_resampling_is_seeded() -> None:
    values = [0.0, 0.5, 1.0]
    assert np.array_equal(resampled_means(values, 3), resampled_means(values, 3))
    assert not np.array_equal(resampled_means(values, 3), resampled_means(values, [3, 1]))
    assert len(resampled_means(values, 3)) == 10_000


def test_percentiles_leave_out_a_fortieth_on_each_side() -> None:
    low, high = percentiles(np.arange(1001.0))
    assert (low, high) == pytest.approx((25.0, 975.0))


def test_the_interval_covers_what_it_says() -> None:
    """The mean of 60 problems, 30 % right, lies in 95 of 100 intervals; over 400 samples, give or take four errors."""
    draws = np.random.default_rng(5).random((400, 60)) < 0.3
    found = [interval([float(one) for one in row], seed) for seed, row in enumerate(draws)]
    covered = np.mean([one["low"] <= 0.3 <= one["high"] for one in found])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 400)
    assert {one["by"] for one in found} == {"bootstrap"}


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (1.0, 1), (0.3, 10), (1.0, 500), (0.5, 83)])
def test_wilson_solves_its_equation(share: float, n: int) -> None:
    """Its ends are the shares that the observed one is 1.96 of their own standard errors away from."""
    for end, other in zip(wilson(share, n), (0.0, 1.0), strict=True):
        if end != other:
            assert abs(share - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959963985, abs=1e-6)
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("values", [[1.0] * 30, [0.0] * 30, [1.0], [0.5] * 4])
def test_where_the_bootstrap_is_a_point_the_interval_is_wilsons(values: list[float]) -> None:
    low, high = wilson(values[0], len(values))
    assert interval(values, 0) == {"low": low, "high": high, "by": "wilson"}
    assert low < high
