"""What right and wrong answers say of a model: pure functions of counts, exact where they can be.

Shapes: P problems, k completions of each. A completion is right (1) or not (0); one without a verdict is not right.
Integers and fractions until the last step, which rounds once; the bootstrap alone is in floating point.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from fractions import Fraction
from statistics import NormalDist, mean
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_at_k(right_P: Sequence[int], k: int) -> float:
    """The mean over the problems of the share of k completions that is right: pass@1, averaged over k draws.

    right_P: right completions of each problem, 0 to k. In [0, 1].
    """
    return float(Fraction(sum(right_P), k * len(right_P)))


def pass_at(j: int, right: int, k: int) -> Fraction:
    """The chance that at least one of j completions is right, drawn without replacement from k of which `right` are.

    1 - C(k - right, j) / C(k, j): unbiased for the chance of j new draws, for 1 <= j <= k. Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code", equation 1.
    """
    assert 1 <= j <= k and 0 <= right <= k, f"pass@{j} of {right} in {k}"
    return 1 - Fraction(math.comb(k - right, j), math.comb(k, j))


def mean_pass_at(j: int, right_P: Sequence[int], k: int) -> float:
    """pass@j, the mean over the problems; see `pass_at`."""
    return float(mean(pass_at(j, right, k) for right in right_P))


def doublings(k: int) -> list[int]:
    """The j that pass@j is shown for: 1, 2, 4, ... up to k, and k itself."""
    return [*(2**n for n in range(k.bit_length()) if 2**n < k), k]


def majority(votes: Sequence[Hashable | None], right: Sequence[bool]) -> Fraction:
    """The expected accuracy of the answer that most of a problem's completions give: maj@k, of one problem.

    votes: what each of k completions answers; equal = the same answer, None = no answer, which is no vote. Among
    answers tied for most, one is taken at random; of one answer, a completion at random (they are right together,
    unless the verifier looks at more than the answer). Without a vote 0.
    Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models".
    """
    by_answer: dict[Hashable, list[bool]] = defaultdict(list)
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            by_answer[vote].append(is_right)
    most = max(map(len, by_answer.values()), default=0)
    tied = [Fraction(sum(members), most) for members in by_answer.values() if len(members) == most]
    return mean(tied) if tied else Fraction(0)


def resampled_means(values_P: Sequence[float], seed: int | Sequence[int]) -> np.ndarray:
    """The means of RESAMPLES samples of P problems each, drawn with replacement, as float64.

    A sample's mean depends on how often it has each value alone, so these counts are drawn, from their multinomial:
    the same law, without drawing problem by problem.
    """
    levels, counts = np.unique(np.asarray(values_P, dtype=np.float64), return_counts=True)
    size = len(values_P)
    drawn = np.random.default_rng(seed).multinomial(size, counts / size, size=RESAMPLES)
    return drawn @ levels / size


def percentiles(means: np.ndarray) -> tuple[float, float]:
    """The interval that leaves out (1 - LEVEL) / 2 of the resampled means on each side."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The LEVEL score interval of a share of n independent trials, within [0, 1]. Wilson 1927."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def interval(values_P: Sequence[float], seed: int | Sequence[int]) -> dict[str, Any]:
    """A LEVEL interval of the problems' mean, as `low`, `high` and `by`, the method.

    values_P: in [0, 1], one for each problem. by: "bootstrap", percentiles over problems; "wilson" where all problems
    have the same value (all right, none right, one problem): there every resample is alike and the bootstrap's
    interval a point, whatever P is. Wilson's takes the value for a share of P trials, too wide rather than too narrow
    where the problems' values are means over k.
    """
    if len(set(values_P)) == 1:
        low, high = wilson(values_P[0], len(values_P))
        return {"low": low, "high": high, "by": "wilson"}
    low, high = percentiles(resampled_means(values_P, seed))
    return {"low": low, "high": high, "by": "bootstrap"}
