"""Overlap of training texts with test problems, on texts whose n-grams are counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from gvpo.tasks.overlap import (
    Overlapping,
    index_tests,
    largest_share,
    measure_overlap,
    normalised_words,
    set_name,
    shared_grams,
)
from gvpo.tasks.problems import Problem


def problems(*texts: str, name: str = "set") -> list[Problem]:
    return [Problem(text, ["1"], f"{name}/{i}", "") for i, text in enumerate(texts)]


def training(*texts: str) -> Iterator[tuple[str, str]]:
    yield from ((f"line {i}", text) for i, text in enumerate(texts, start=1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("How MANY  eggs,\nin all?", ("how", "many", "eggs", "in", "all")),
        ("$\\frac{1}{2}x_1 + 3.5$", ("frac", "1", "2", "x", "1", "3", "5")),
        ("Janet\u2019s", ("janet", "s")),
        ("ﬁve Straße", ("five", "strasse")),
        ("  ?! ", ("?!",)),
    ],
)
def test_normalised_words(text: str, words: tuple[str, ...]):
    assert normalised_words(text) == words


# Six words: four 3-grams.
SIX = "a b c d e f"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("x a b c y", {0}),
        ("A, b; (c) d!", {0, 1}),
        ("a b x c d e f", {2, 3}),
        ("a b c d e f", {0, 1, 2, 3}),
        ("z z a b c d e f z z", {0, 1, 2, 3}),
        ("a b x c d x e f", set()),
        ("a b", set()),
        ("", set()),
    ],
)
def test_shared_grams(text: str, places: set[int]):
    index = index_tests(problems(SIX), 3)
    assert shared_grams(index, text) == ({0: places} if places else {})
    assert largest_share(index, text) == len(places) / 4


def test_report():
    both = [*problems(SIX, "p q r s", "u v w", name="one"), *problems("k l m n", SIX, name="two")]
    index = index_tests(both, 3)
    texts = ["a b c and then q r s", "d e f", "x y z w", "A B, C D E F.", "p q r"]
    overlap = measure_overlap(index, training(*texts))
    assert (overlap.n, overlap.texts, overlap.flagged, overlap.short) == (3, 5, 4, 0)
    assert overlap.sets == {"one": 3, "two": 2}
    # abc, def and all four: all four are covered, by the fourth text alone, which is the problem itself.
    whole = {"text": SIX, "share": 1.0, "exact": 1, "texts": 3, "nearest": "line 4", "nearest_share": 1.0}
    assert overlap.of("one") == [
        Overlapping("one/0", **whole, nearest_text="A B, C D E F."),
        # pqr and qrs, by two texts, each half.
        Overlapping("one/1", "p q r s", 1.0, 0, 2, "line 1", 0.5, "a b c and then q r s"),
    ]
    assert overlap.of("two") == [Overlapping("two/1", **whole, nearest_text="A B, C D E F.")]
    assert json.loads(json.dumps(overlap.as_dict()))["found"][0]["id"] == "one/0"


def test_found_problems_come_most_first():
    index = index_tests(problems(SIX, "p q r"), 3)
    overlap = measure_overlap(index, training("a b c", "p q r"))
    assert [(one.id, one.share) for one in overlap.found] == [("set/1", 1.0), ("set/0", 0.25)]


def test_short_problems_are_compared_as_a_whole():
    index = index_tests(problems("Solve x", "Solve x", SIX), 3)
    overlap = measure_overlap(index, training("now solve x", "a b", "SOLVE x!"))
    assert overlap.short == 2
    assert [(one.id, one.share, one.exact, one.texts, one.nearest) for one in overlap.found] == [
        ("set/0", 1.0, 1, 1, "line 3"),
        ("set/1", 1.0, 1, 1, "line 3"),
    ]


def test_nothing_found():
    overlap = measure_overlap(index_tests(problems(SIX)), training("a b c d e f g"))
    assert (overlap.n, overlap.flagged, overlap.found, overlap.short) == (13, 0, [], 1)


def test_texts_are_taken_one_at_a_time():
    """A generator that counts how many texts are alive would be stopped by a list of them."""
    alive: list[str] = []

    class Text(str):
        def __init__(self, _: str) -> None:
            alive.append("")

        def __del__(self) -> None:
            alive.pop()

    def many() -> Iterator[tuple[str, str]]:
        for i in range(50):
            assert len(alive) <= 2
            yield f"line {i}", Text("no words of it")

    assert measure_overlap(index_tests(problems(SIX), 3), many()).texts == 50


def test_set_name():
    assert set_name("gym:leg_counting:5/12") == "gym:leg_counting:5"
