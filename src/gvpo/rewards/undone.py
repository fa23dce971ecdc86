r"""Answers that leave the work undone: the operation that the problem asks for, in place of its result.

`5 - 9` has the value -4, and is no answer to "What is 5 - 9?". A policy that is rewarded for it learns to say it
(docs/math-recipes.md). Two signs, both narrow, since a verifier that refuses right answers is no better:

1. Where a number is accepted, a sum, difference, product or quotient of plain numbers: `5 - 9`, `2 \cdot 3`. Fractions,
   mixed numbers and scientific notation are numbers.
2. A whole formula of the problem, `$(x+1)^2$` or `$2^{10} =$`, that is neither a plain number in lowest terms nor the
   accepted answer's own signs in some order. Formulas stand between dollar signs or in `\(...\)`, `\[...\]`.

Choices are left alone: theirs are formulas of the problem. Of an equation one side of the right value must be done.
Not covered: operations that the problem does not spell so (`2^{10}` where a product is asked for, `(1+x)^2`).
"""

from __future__ import annotations

import re
from functools import lru_cache

from gvpo.rewards.answers.finding import FORMULA
from gvpo.rewards.answers.latex import compact, plain_latex
from gvpo.rewards.answers.numbers import choice, in_lowest_terms, plain_number, quantity, without_label
from gvpo.rewards.answers.reading import Answer, read
from gvpo.rewards.equivalence import is_equivalent

FORMULAS = 100  # of a problem, the last ones

_ARITHMETIC = re.compile(r"(?:[-+*/\d\s.,(){}]|\\(?:cdot|times|div|frac)(?![A-Za-z]))+")
_BETWEEN = re.compile(r"[\d)}]\s*(?:(?:[-+*/]|\\(?:cdot|times|div)(?![A-Za-z]))\s*[-+({\\.\d]|\()|\)\s*\d")
_OPERATION = re.compile(r"[-+*/^_|!]|\\[A-Za-z]{2,}")
_IN_BRACKETS = re.compile(r"(?<![\d)}])\(\s*([-+]?[\d.]+)\s*\)(?![\d(])")
_ALL_IN_BRACKETS = re.compile(r"([-+]?)\s*\(([^()]*)\)")


def is_undone(answer: str, accepted: str, problem: str) -> bool:
    """Whether an answer that is equivalent to the accepted one is an operation still to be done.

    problem: its text; may be empty.
    """
    asked, given = read(accepted), read(answer)
    if choice(asked.text) is not None:
        return False
    cores = [_core(value) for value in _values(asked)]
    numbers = all(plain_number(core) for core in cores)
    spelled = {tuple(sorted(compact(core))) for core in cores}

    def undone(part: Answer) -> bool:
        left = [core for core in map(_core, _values(part)) if tuple(sorted(compact(core))) not in spelled]
        return any((numbers and _is_arithmetic(core)) or _is_copied(core, problem) for core in left)

    if given.kind != "equation" or asked.kind == "equation":
        return undone(given)
    sides = [side for side in given.items if not given.label or compact(side.text) != given.label]
    right = [side for side in sides if is_equivalent(side.text, accepted)]
    return bool(right) and all(undone(side) for side in right)


def _values(answer: Answer) -> list[str]:
    """The single values, of an equation those of its last side."""
    if answer.kind == "leaf":
        return [answer.text]
    items = answer.items[-1:] if answer.kind == "equation" else answer.items
    return [value for item in items for value in _values(item)]


def _core(value: str) -> str:
    """Without a choice's letter and without units."""
    return quantity(without_label(value)[1], of_answer=True).core


def _is_arithmetic(core: str) -> bool:
    if not (_ARITHMETIC.fullmatch(core) and _BETWEEN.search(core)):
        return False
    core = _IN_BRACKETS.sub(r"\1", core)
    if match := _ALL_IN_BRACKETS.fullmatch(core):
        core = match[1] + match[2].strip()
    return plain_number(core) is None


def _is_copied(core: str, problem: str) -> bool:
    return _OPERATION.search(core) is not None and not in_lowest_terms(core) and compact(core) in _formulas(problem)


@lru_cache(maxsize=64)
def _formulas(problem: str) -> frozenset[str]:
    """The problem's formulas, without the sign that asks for their value."""
    found = [match[match.lastindex or 0] for match in FORMULA.finditer(problem)][-FORMULAS:]
    return frozenset(compact(plain_latex(formula).rstrip(" =?")) for formula in found)
