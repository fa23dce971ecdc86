r"""A problem with its accepted answers, and how rows of data sets and files become one.

Covered: the columns of `PROBLEM_COLUMNS` and `ANSWER_COLUMNS`; an answer that is a number, a text, a list of them, a
whole GSM8K solution (`#### 72`) or, in the column `solution`, a MATH one (`\boxed{72}`). Not covered: problems with
images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo.errors import FieldError, UserError, located

PROBLEM_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("answers", "answer", "final_answer", "solution")
"""Where a row's problem and answers are looked for, the first that it has."""

_GSM8K = re.compile(r"####[ \t]*([^\n]*)\s*$")
_BOXED = re.compile(r"\\f?boxed\s*")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its accepted answers.

    text: the problem statement. answers: at least one, each a text that is not blank. id: stable, "TASK/NUMBER" with
    the number from 0. where: how messages name it ("amc.jsonl, line 3"). columns: what else the row has.
    """

    text: str
    answers: list[str]
    id: str
    where: str
    columns: dict[str, Any] = field(default_factory=dict)


def read_problem(
    row: Any,
    where: str,
    id: str,
    problem_columns: Sequence[str] = PROBLEM_COLUMNS,
    answer_columns: Sequence[str] = ANSWER_COLUMNS,
) -> Problem:
    """The problem in a row, checked. Raises UserError naming `where`, the field, and how to mend it."""
    with located(where):
        if not isinstance(row, Mapping):
            raise UserError(
                f"expected an object with {problem_columns[0]!r} and {answer_columns[0]!r}, got {row!r:.60}"
            )
        problem, answer = _present(row, problem_columns), _present(row, answer_columns)
        text = row[problem]
        if not isinstance(text, str):
            raise FieldError(problem, f"expected a text, got {_shown(text)}; give the problem statement")
        if not text.strip():
            raise FieldError(problem, "empty; give the problem statement, or remove the row")
        answers = read_answers(answer, row[answer])
        columns = {str(key): value for key, value in row.items() if key not in (problem, answer)}
        if answer == "solution" or (isinstance(row[answer], str) and answers != [row[answer].strip()]):
            columns["solution"] = row[answer]
        return Problem(text, answers, id, where, columns)


def read_answers(column: str, value: Any) -> list[str]:
    """The accepted answers in a column's value, stripped of white space at their ends.

    Raises FieldError for none, a blank one, and what is neither a text nor a finite number.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise FieldError(column, "an empty list; give at least one accepted answer, or remove the row")
    names = [f"{column}[{i}]" for i in range(len(values))] if values is value else [column]
    return [_answer(name, column, one) for name, one in zip(names, values, strict=True)]


def gsm8k_final(solution: str) -> str | None:
    """What a GSM8K solution has after `####` on its last line, thousands commas removed; None without that."""
    match = _GSM8K.search(solution)
    return match[1].strip().replace(",", "") if match else None


def last_boxed(solution: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` (braces may nest) or `\boxed 5`; None without one."""
    last = None
    for last in _BOXED.finditer(solution):  # noqa: B007
        pass
    if last is None:
        return None
    start = last.end()
    if not solution.startswith("{", start):
        bare = re.match(r"[^\s$]+", solution[start:])
        return bare[0] if bare else None
    depth = 0
    for place in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if depth == 0:
            return solution[start + 1 : place].strip()
    return None


def _present(row: Mapping[Any, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    has = ", ".join(map(str, row)) or "nothing"
    state = "null" if any(name in row for name in names) else "missing"
    raise FieldError(names[0], f"{state} (the row has {has}); give it as {' or '.join(map(repr, names))}")


def _answer(name: str, column: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)
    if not isinstance(value, str):
        raise FieldError(name, f"expected a text or a finite number, got {_shown(value)}; give the accepted answer")
    text = value.strip()
    if column == "solution":
        found = last_boxed(text) or gsm8k_final(text)
        if not found:
            raise FieldError(name, r"holds no answer in \boxed{}; give it in a column 'answer'")
        return found
    text = gsm8k_final(text) if "####" in text else text
    if not text:
        raise FieldError(name, "an empty text; give the accepted answer, or remove the row")
    return text


def _shown(value: Any) -> str:
    return str(value) if value is None or isinstance(value, bool | float) else type(value).__name__
