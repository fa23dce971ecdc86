"""Votes: which answers are the same, and how often anybody is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gvpo.evaluation.votes import EqualInWorkers, number_votes

SAME = [{"1/2", "0.5", "\\frac12"}, {"x+1", "1+x"}]


class Judge:
    """Knows what SAME says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, list[str]]]] = []

    def __call__(self, asked: Sequence[tuple[str, list[str]]]) -> list[list[bool | None]]:
        self.calls.append(list(asked))
        return [[any({first, one} <= same for same in SAME) for one in others] for first, others in asked]


def votes(answers: list[str | None], right: str | None = None) -> tuple[list[int | None], Judge]:
    judge = Judge()
    flags = [mark == "r" for mark in right or "w" * len(answers)]
    (numbered,), (failed,) = number_votes([answers], [flags], judge)
    assert failed == 0
    return numbered, judge


def test_texts_that_are_equal_need_no_judge() -> None:
    numbered, judge = votes(["7", " 7", "007", "+7", None, "8"])
    assert (numbered, judge.calls) == ([0, 0, 0, 0, None, 1], [])


def test_mathematics_joins_what_text_does_not() -> None:
    numbered, judge = votes(["0.5", "x+1", "1/2", "3", "\\frac12", "1+x", "1/2"])
    assert numbered == [0, 1, 0, 2, 0, 1, 0]
    assert judge.calls[0] == [("0.5", ["x+1", "1/2", "3", "\\frac12", "1+x"])]
    assert [first for ((first, _),) in judge.calls] == ["0.5", "x+1"]  # the last has nothing left to be compared with


def test_right_and_wrong_ones_are_never_compared() -> None:
    numbered, judge = votes(["0.5", "1/2", "x+1", "1+x"], "rwrr")
    assert numbered == [0, 1, 2, 2]
    assert judge.calls[0] == [("0.5", ["x+1", "1+x"])]


def test_an_answer_of_both_kinds_is_compared_with_both() -> None:
    numbered, _ = votes(["0.5", "0.5", "1/2", "\\frac12"], "rwrw")
    assert numbered == [0, 0, 0, 0]


def test_problems_are_compared_together_and_apart() -> None:
    judge = Judge()
    answers = [["0.5", "1/2"], ["1/2", "x+1", "y"], [None, None], []]
    votes = [[0, 0], [0, 1, 2], [None, None], []]
    assert number_votes(answers, [[False] * len(one) for one in answers], judge) == (votes, [0] * 4)
    assert judge.calls == [
        [("0.5", ["1/2"]), ("1/2", ["x+1", "y"])],
        [("x+1", ["y"])],
    ]


def test_comparisons_that_fail_are_differences_and_counted() -> None:
    def judge(asked: Sequence[tuple[str, list[str]]]) -> list[list[bool | None]]:
        known = Judge()(asked)
        return [
            [None if "slow" in {first, other} else same for other, same in zip(others, found, strict=True)]
            for (first, others), found in zip(asked, known, strict=True)
        ]

    answers = [["slow", "x+1", "y"], ["1/2", "0.5", "slow"]]
    assert number_votes(answers, [[False] * 3] * 2, judge) == ([[0, 1, 2], [0, 0, 1]], [2, 1])


@pytest.mark.parametrize("count", [1, 40])
def test_every_round_takes_an_answer_off(count: int) -> None:
    numbered, judge = votes([f"a{n}" for n in range(count)])
    assert numbered == list(range(count))
    assert len(judge.calls) == count - 1


class TestInWorkers:
    def test_mathematics(self) -> None:
        asked = [("1/2", ["0.5", "2", "\\frac{2}{4}"]), ("x+1", ["1+x"])]
        assert EqualInWorkers()(asked) == [[True, False, True], [True]]

    def test_comparisons_that_fail_are_told_of_however_many(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "algebra.py").write_text(
            "import os\n"
            "def same(completions, other, **columns):\n"
            "    if 'bad' in other: os._exit(1)\n"
            "    return [float(one == another) for one, another in zip(completions, other)]\n"
        )
        monkeypatch.chdir(tmp_path)
        equal = EqualInWorkers("algebra:same")
        many = [str(n) for n in range(45)]
        for _ in range(3):
            assert equal([("bad", many[:8]), ("7", many)]) == [[None] * 8, [one == "7" for one in many]]
        assert equal([("bad", many)]) == [[None] * 45]
