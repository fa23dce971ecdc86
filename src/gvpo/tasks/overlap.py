"""Do training texts hold the test problems? Overlap of word n-grams, n = 13 as in GPT-3's (arXiv 2005.14165, app. C).

Words are runs of letters and digits, in lower case: spacing, punctuation and LaTeX's signs do not matter. A test
problem shares with a training text the n-grams that both have; one shorter than n words is compared as a whole.
Memory is bounded by the test problems: training texts are taken one at a time.

Covered: problems copied whole or in part. Not covered: the same problem in other words, with other numbers, or in
another language; solutions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gvpo.tasks.problems import Problem

NGRAM = 13

Gram = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class OverlapIndex:
    """Where each n-gram of the test problems is: (problem's place in the list, n-gram's place in it)."""

    n: int
    problems: Sequence[Problem]
    sizes: list[int]
    places: Mapping[Gram, list[tuple[int, int]]]
    wholes: Mapping[Gram, list[int]]


@dataclass(slots=True)
class Overlapping:
    """A test problem that training texts share n-grams with.

    share: of its n-grams, those that some training text has. exact: training texts that are the same problem, word by
    word. texts: training texts that share any. nearest: where the one that shares most is, nearest_share how much.
    """

    id: str
    text: str
    share: float = 0.0
    exact: int = 0
    texts: int = 0
    nearest: str = ""
    nearest_share: float = 0.0
    nearest_text: str = ""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What training texts share with test problems.

    n: words in an n-gram. texts: training texts compared. flagged: those that share an n-gram with any problem.
    sets: problems in each test set, by its name. short: problems of fewer than n words, compared as a whole. found: the
    problems that any text shares an n-gram with, most first.
    """

    n: int
    texts: int
    flagged: int
    sets: dict[str, int]
    short: int
    found: list[Overlapping] = field(default_factory=list)

    def of(self, name: str) -> list[Overlapping]:
        """What was found in one test set."""
        return [one for one in self.found if set_name(one.id) == name]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def index_tests(problems: Sequence[Problem], n: int = NGRAM) -> OverlapIndex:
    """The index that training texts are compared with; n: words in an n-gram, at least 1."""
    assert n >= 1
    places: dict[Gram, list[tuple[int, int]]] = defaultdict(list)
    wholes: dict[Gram, list[int]] = defaultdict(list)
    sizes = []
    for number, problem in enumerate(problems):
        words = normalised_words(problem.text)
        grams = _grams(words, n)
        sizes.append(len(grams))
        wholes[words].append(number)
        for place, gram in enumerate(grams):
            places[gram].append((number, place))
    return OverlapIndex(n, problems, sizes, dict(places), dict(wholes))


def shared_grams(index: OverlapIndex, text: str) -> dict[int, set[int]]:
    """For each test problem, by its place in the list, that shares n-grams with the text: which of its n-grams."""
    shared: dict[int, set[int]] = defaultdict(set)
    for gram in _grams(normalised_words(text), index.n):
        for number, place in index.places.get(gram, ()):
            shared[number].add(place)
    return dict(shared)


def largest_share(index: OverlapIndex, text: str) -> float:
    """The most that the text has of any test problem, as a share of that problem's n-grams, 0 to 1."""
    return max((len(grams) / index.sizes[number] for number, grams in shared_grams(index, text).items()), default=0.0)


def measure_overlap(index: OverlapIndex, texts: Iterable[tuple[str, str]]) -> Overlap:
    """What the training texts, each after where it is, share with the test problems."""
    found: dict[int, Overlapping] = {}
    covered: dict[int, set[int]] = defaultdict(set)
    count = flagged = 0
    for where, text in texts:
        count += 1
        shared = shared_grams(index, text)
        flagged += bool(shared)
        for number, grams in shared.items():
            covered[number] |= grams
            one = found.setdefault(number, Overlapping(index.problems[number].id, index.problems[number].text))
            one.texts += 1
            if len(grams) / index.sizes[number] > one.nearest_share:
                one.nearest, one.nearest_share, one.nearest_text = where, len(grams) / index.sizes[number], text
        for number in index.wholes.get(normalised_words(text), ()):
            found[number].exact += 1
    for number, one in found.items():
        one.share = len(covered[number]) / index.sizes[number]
    sets = dict(Counter(set_name(problem.id) for problem in index.problems))
    short = sum(len(words) < index.n and len(numbers) for words, numbers in index.wholes.items())
    ordered = sorted(found.values(), key=lambda one: -one.share)
    return Overlap(index.n, count, flagged, sets, short, ordered)


def set_name(id: str) -> str:
    """The test set of a problem with this id."""
    return id.rpartition("/")[0]


def normalised_words(text: str) -> Gram:
    """The words of a text as they are compared; the text itself where it has none."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(plain)) or (plain.strip(),)


def _grams(words: Gram, n: int) -> list[Gram]:
    return [words] if len(words) < n else list(zip(*(words[start:] for start in range(n)), strict=False))
