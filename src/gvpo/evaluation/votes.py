r"""Which completions of a problem give the same answer: what a majority vote counts.

Answers are compared as text first, runs of white space as one, integers by value. What is left is compared as
mathematics, by `gvpo.rewards.equivalence.is_equivalent`, in processes that can be killed: a model's answer may be an
expression that no algebra system comes to an end with. Such a pair is not known to be equal, and counts as different;
it is told of.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from gvpo.rewards.limits import Limits
from gvpo.rewards.outputs import Output
from gvpo.rewards.workers.pool import PooledFunction, RewardPool

Equal = Callable[[Sequence[tuple[str, list[str]]]], list[list[bool | None]]]
"""For each of some answers, and others that it is compared with, which of these are the same; None = not known."""

SECONDS = 10.0
_TOGETHER = 16

_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")


def number_votes(
    answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]], equal: Equal
) -> tuple[list[list[int | None]], list[int]]:
    """For each problem and completion the number of its answer, from 0 as they come; None where it has none.

    And for each problem how many comparisons failed.

    right: one that is right and one that is not are never the same, and not compared. An answer belongs to the first
    one that it equals. All problems are compared together, one answer of each against what is left of them a round.
    """
    left = [_texts(*problem) for problem in zip(answers, right, strict=True)]
    numbers: list[dict[str, int]] = [{} for _ in left]
    failed = [0 for _ in left]
    while any(left):
        rounds = [(p, *_next_round(texts)) for p, texts in enumerate(left) if texts]
        asked = [(p, first, others) for p, first, others in rounds if others]
        found = equal([(first, others) for _, first, others in asked]) if asked else []
        same = {p: list(itertools.compress(others, which)) for (p, _, others), which in zip(asked, found, strict=True)}
        for (p, _, _), which in zip(asked, found, strict=True):
            failed[p] += which.count(None)
        for p, first, _ in rounds:
            number = len(set(numbers[p].values()))
            for text in [first, *same.get(p, [])]:
                numbers[p][text] = number
                del left[p][text]
    votes = [
        [None if answer is None else known[_text(answer)] for answer in problem]
        for problem, known in zip(answers, numbers, strict=True)
    ]
    return votes, failed


class EqualInWorkers:
    """`Equal` by a reward function with the column `other`, in killable processes, which start when it is first asked.

    entry: the function, `module:function`; 1.0 = the same. None for a comparison that fails.
    """

    def __init__(self, entry: str = f"{__name__}:same_answer", seconds: float = SECONDS) -> None:
        self._entry, self._seconds = entry, seconds
        self._pool: RewardPool | None = None

    def __call__(self, asked: Sequence[tuple[str, list[str]]]) -> list[list[bool | None]]:
        """See `Equal`."""
        started = [self._start(first, others) for first, others in asked]
        values = [[value for part in parts for value in part.result().values] for parts in started]
        return [[None if value is None else value == 1.0 for value in problem] for problem in values]

    def _start(self, first: str, others: list[str]) -> list[Future[Output]]:
        parts = [others[at : at + _TOGETHER] for at in range(0, len(others), _TOGETHER)]
        return [
            self._function.submit("same_answer", {"completions": part, "other": [first] * len(part)}, len(part))
            for part in parts
        ]

    @property
    def _function(self) -> PooledFunction:
        # One answer may hang against all others.
        self._pool = self._pool or RewardPool([self._entry], Limits(self._seconds), give_up=False)
        return self._pool.functions[0]


def same_answer(*, completions: Sequence[str], other: Sequence[str], **columns: Any) -> list[float]:
    """A reward function: 1.0 where the completion, an answer alone, equals `other`."""
    from gvpo.rewards.equivalence import is_equivalent

    return [float(is_equivalent(one, another)) for one, another in zip(completions, other, strict=True)]


def _text(answer: str) -> str:
    text = " ".join(answer.split())
    return str(int(text)) if _is_integer(text) else text


def _texts(answers: Sequence[str | None], right: Sequence[bool]) -> dict[str, set[bool]]:
    """The answers as text, each with whether it is right; both, where the verifier looks at more than the answer."""
    texts: dict[str, set[bool]] = {}
    for answer, is_right in zip(answers, right, strict=True):
        if answer is not None:
            texts.setdefault(_text(answer), set()).add(is_right)
    return texts


def _next_round(texts: dict[str, set[bool]]) -> tuple[str, list[str]]:
    """The first answer, and those that only mathematics can tell whether they are the same."""
    first, *rest = texts
    return first, [one for one in rest if texts[one] & texts[first] and not (_is_integer(one) and _is_integer(first))]


def _is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None
