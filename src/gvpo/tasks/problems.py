r"""A problem with its accepted answers, and how rows of data sets and files become one.

Covered: the columns `PROBLEM_COLUMNS` and `ANSWER_COLUMNS`; an answer that is a number, a text, a list of them, a whole
solution, GSM8K's (`#### 72`) or MATH's (`\boxed{72}`), read as `math_accuracy` reads completions. Not covered: problems
with images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo.errors import FieldError, UserError, located
from gvpo.groups import DATASET_KEYS
from gvpo.rewards.equivalence import extract_answer

PROBLEM_COLUMNS = ("problem", "question")
_MARK = re.compile(r"####|\\(?:boxed|fbox)(?![A-Za-z])")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")

ANSWER_COLUMNS = ("answers", "answer", "final_answer", "solution")
"""Where a row's problem and its answers are looked for: the first that is there and not null."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its accepted answers.

    text: the problem statement. answers: at least one, none blank. id: stable, "TASK/NUMBER" with the number from 0.
    where: how messages name it ("amc.jsonl, line 3"). columns: what else the row has.
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
    """The problem in a row, checked; a whole solution that the answer was read from is kept as the column `solution`.

    Raises UserError, one line, naming `where`, the field, and how to mend it.
    """
    with located(where):
        if not isinstance(row, Mapping):
            columns = " and ".join(repr(names[0]) for names in (problem_columns, answer_columns))
            raise UserError(f"expected an object with {columns}, got {row!r:.60}")
        problem, answer = _present(row, problem_columns), _present(row, answer_columns)
        text = _text(problem, row[problem], "the problem statement")
        answers = read_answers(answer, row[answer])
        columns = {str(key): value for key, value in row.items() if key not in {problem, answer, *DATASET_KEYS}}
        if isinstance(row[answer], str) and answers != [row[answer].strip()]:
            columns.setdefault("solution", row[answer])
        return Problem(text, answers, id, where, columns)


def read_answers(column: str, value: Any) -> list[str]:
    """The accepted answers in a column's value, without white space at their ends; whole numbers without a point.

    Raises FieldError for an empty list, a blank answer, and what is neither a text nor a finite number.
    """
    if not isinstance(value, list | tuple):
        return [_answer(column, value, column)]
    if not value:
        raise FieldError(column, "an empty list; give at least one accepted answer, or remove the row")
    return [_answer(f"{column}[{i}]", one, column) for i, one in enumerate(value)]


def _present(row: Mapping[Any, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    given = [name for name in names if name in row]
    state = "null" if given else f"missing (the row has {', '.join(map(str, row)) or 'nothing'})"
    choice = " or ".join(map(repr, names))
    raise FieldError([*given, *names][0], f"{state}; give it as {choice}, or remove the row")


def _answer(name: str, value: Any, column: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise FieldError(name, f"{value} is non-finite; give the accepted answer as a text or a number")
        return str(int(value)) if value == int(value) else repr(value)
    text = _text(name, value, "an accepted answer").strip()
    marked = _MARK.search(text)
    found = extract_answer(text) if marked else None if column == "solution" else text
    if not found:
        mark = r"in \boxed{} or after ####"
        raise FieldError(name, f"a solution without an answer {mark}; give the answer in a column 'answer'")
    return found.replace(",", "") if "####" in text and _THOUSANDS.fullmatch(found) else found


def _text(name: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        shown = str(value) if isinstance(value, bool | int | float | None) else type(value).__name__
        raise FieldError(name, f"expected a text, got {shown}; give {what}, or remove the row")
    if not value.strip():
        raise FieldError(name, f"empty; give {what}, or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # neither a file nor a tokenizer could take it
        raise FieldError(name, f"half of a surrogate pair at character {error.start + 1}; remove it") from None
    return value
