"""The reward for mathematics: the completion's final answer, compared with the accepted ones."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from itertools import product
from numbers import Number
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.answers.finding import final_answers
from gvpo.rewards.answers.latex import is_blank
from gvpo.rewards.equivalence import extract_answer, is_equivalent, readings
from gvpo.rewards.guard import guarded
from gvpo.rewards.ready import Texts, completion_text, problem_texts
from gvpo.rewards.undone import is_undone
from gvpo.rewards.workers.worker import is_worker

if importlib.util.find_spec("math_verify") is None:
    raise UserError("math_accuracy needs math-verify: pip install 'gvpo[math]'")


def math_accuracy(*, completions: Texts | None, answers: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where the completion's final answer is equivalent to one of the row's accepted `answers`, else 0.0.

    answers: for each row a string or number, or a list of them; whole solutions that end in `\boxed{}` or `####` too.
        None: no verdict, another function's task.
    problem, prompts: columns, where there are any; the operation that a problem asks for is no answer to it
        (`gvpo.rewards.undone`).
    The final answer is what `gvpo.rewards.answers.finding` says: one counts, the last. What cannot be read, or is too
    large to be evaluated, is right only where it is the accepted answer as text. Computed in processes that are killed
    after 30 s (`gvpo.rewards.guarded`): a member that takes longer gets None, which is logged.

    Raises UserError for an accepted answer that is empty, or no string or finite number; the import does without
    math-verify.
    """
    if completions is None:
        raise UserError("reward 'math_accuracy' reads texts, and these completions are ids alone: give a tokenizer")
    texts = [completion_text(completion) for completion in completions]
    problems = problem_texts(columns.get("problem"), columns.get("prompts"), len(texts))
    if not is_worker():
        return guarded("gvpo.rewards.math:math_accuracy")(completions=texts, answers=list(answers), problem=problems)
    return [
        None if row is None else float(_is_right(text, accepted_answers(row), problem))
        for text, row, problem in zip(texts, answers, problems, strict=True)
    ]


def accepted_answers(row: Any) -> list[str]:
    """The accepted answers of one row of the column `answers`, as text; UserError where there is none."""
    row = row.tolist() if hasattr(row, "tolist") else row
    values = list(row) if isinstance(row, list | tuple) else [row]
    if not values:
        raise _mistake("[]", "is empty: give one accepted answer at least")
    return [_accepted(value) for value in values]


def _accepted(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | Number):
        raise _mistake(value, "is no string or number: give text, LaTeX or plain")
    if isinstance(value, float) and not math.isfinite(value):
        raise _mistake(value, "is no finite number: give a value, or null for a row that has none")
    text = str(value)
    if "\\boxed" in text or "####" in text:
        text = extract_answer(text) or ""
    if is_blank(text):
        raise _mistake(value, "holds no answer: give a value, or null for a row that has none")
    return text


def _mistake(value: Any, problem: str) -> UserError:
    return UserError(f"reward 'math_accuracy': column 'answers': {str(value)[:80]!r} {problem}")


def _is_right(text: str, accepted: Sequence[str], problem: str) -> bool:
    pairs = product(final_answers(text), accepted)
    return any(
        is_equivalent(said, one) and not is_undone(said, one, problem)
        for answer, one in pairs
        for said in readings(answer, one)
    )
