r"""Answers that leave the work undone: the operation that the problem asks for, in place of its result.

`5 - 9` has the value -4, and is no answer to "What is 5 - 9?". A policy that is rewarded for it learns to say it
(docs/math-recipes.md). Two signs, neither of which looks at an answer that is the accepted one as text:

1. Where a number is accepted, sums, differences, products and quotients of numbers: `5 - 9`, `2 \cdot 3`. Fractions,
   mixed numbers, decimals and scientific notation are numbers.
2. An operation of any kind that stands in the problem: `\sin 60^\circ`, `(x+1)^2`, `10/2`. A fraction in lowest terms
   is a number.

Not covered: operations in another form than the problem's (`2^{10}` where 1024 is asked for as a product).
"""

from __future__ import annotations

import re
from functools import lru_cache

from gvpo.rewards.answers.latex import LONGEST, compact, plain_latex, without_needless_braces
from gvpo.rewards.answers.numbers import in_lowest_terms, plain_number, quantity
from gvpo.rewards.answers.reading import Answer, read

_ARITHMETIC = re.compile(r"(?:[-+*/\d\s.,(){}]|\\(?:cdot|times|div|frac)(?![A-Za-z]))+")
_BETWEEN = re.compile(r"[\w)}!]\s*(?:[-+*/^]|\\(?:cdot|times|div)(?![A-Za-z]))\s*[-+\w({\\.]")
_OPERATOR = re.compile(r"\\(?:frac|sqrt|binom|sin|cos|tan|cot|sec|csc|arc[a-z]+|log|ln|exp|gcd|sum|prod|int|lim)|!")


def is_undone(answer: str, accepted: str, problem: str) -> bool:
    """Whether the answer, which has the accepted one's value, is an operation still to be done.

    problem: its text; may be empty.
    """
    asked = _values(read(accepted))
    texts = {compact(value) for value in asked}
    numbers = all(plain_number(quantity(value, of_answer=False).core) for value in asked)
    left = [value for value in _values(read(answer)) if compact(value) not in texts]
    return any((numbers and _is_arithmetic(value)) or _is_copied(value, problem) for value in left)


def _values(answer: Answer) -> list[str]:
    """The single values, of an equation those of its last side."""
    if answer.kind == "leaf":
        return [answer.text]
    items = answer.items[-1:] if answer.kind == "equation" else answer.items
    return [value for item in items for value in _values(item)]


def _is_arithmetic(value: str) -> bool:
    core = quantity(value, of_answer=True).core
    return bool(_ARITHMETIC.fullmatch(core) and _BETWEEN.search(core)) and plain_number(core) is None


def _is_copied(value: str, problem: str) -> bool:
    core = quantity(value, of_answer=True).core
    if len(core) > LONGEST or in_lowest_terms(core) or not (_BETWEEN.search(core) or _OPERATOR.search(core)):
        return False
    spelled = r"\s*".join(map(re.escape, compact(core)))
    return re.search(rf"(?<![\w.]){spelled}(?!\w)", _plain(problem)) is not None


@lru_cache(maxsize=64)
def _plain(problem: str) -> str:
    return without_needless_braces(plain_latex(problem))
