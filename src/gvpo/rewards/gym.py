"""The reward for reasoning-gym's tasks: their own scorers, given nothing that they could run as code.

Some of these scorers hand the answer to `eval`, or to sympy's `parse_expr`, which calls it: a completion could run
any Python. Here they get such an answer only where it is a literal, or arithmetic whose numbers stay small.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.rewards.ready import Texts, completion_text
from gvpo.rewards.shape import after_thought, boxes

Scorer = Callable[[str, dict[str, Any]], float]

LONGEST = 10_000  # characters; a longer answer, and one four times as long as the right one, is none

_LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
_EXPRESSIONS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
_INERT = re.compile(r"[A-Za-z0-9_\s-]*")  # numbers, words and boards: nothing to call, nothing that repeats
_PLAIN = re.compile(r"[A-Za-z0-9 .+\-*/()]{0,2000}")
_TRIGONOMETRY = ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh")
_FUNCTIONS = frozenset({*_TRIGONOMETRY, "exp", "log", "ln", "sqrt", "Abs", "abs"})
_BITS = 1000.0  # of the largest number in an expression


def reasoning_gym_score(
    *, completions: Texts | None, gym_task: Sequence[Any], gym_entry: Sequence[Any], **columns: Any
) -> list[float | None]:
    r"""What reasoning-gym's scorer of the row's `gym_task` gives for the completion's answer, from 0 to 1.

    gym_task: the name of a dataset; None where the row is none of these, and the reward then is None.
    gym_entry: the entry as the dataset made it, or its JSON: question, answer, metadata.
    The answer is what stands, after the last `</think>`, in the last `<answer>...</answer>`; else in the last
    `\boxed{}`; else in the last lines, as many as the right answer has, empty ones not counted. (reasoning-gym's own
    `extract_answer` knows the tags alone.) An answer that the scorer cannot read gets what an empty one gets.

    Needs reasoning-gym: `pip install 'gvpo[tasks]'`. Scorers have the default settings of their dataset.
    Raises UserError without that package, for an unknown task, and for an entry that the scorer cannot read.
    """
    if completions is None:
        raise UserError(
            "reward 'reasoning_gym_score' reads texts, and these completions are ids alone: give a tokenizer"
        )
    rows = zip(completions, gym_task, gym_entry, strict=True)
    return [None if task is None else _score(task, entry, completion_text(one)) for one, task, entry in rows]


def gym_answer(text: str, lines: int = 1) -> str:
    """The final answer in a completion, as `reasoning_gym_score` reads it; lines: of the right answer."""
    text = after_thought(text)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end if end >= 0 else None)
    if start >= 0:
        return text[start + len("<answer>") : end if end >= 0 else None].strip()
    if found := boxes(text):
        return found[-1].strip()
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-max(lines, 1) :]).strip()


def _score(task: str, entry: Any, text: str) -> float:
    entry = _read(task, entry)
    right, scorer = str(entry["answer"]), _scorer(task)
    answer = gym_answer(text, len([line for line in right.splitlines() if line.strip()]))
    if len(answer) > max(LONGEST, 4 * len(right)) or not _is_harmless(task, answer):
        answer = ""
    try:
        with warnings.catch_warnings(action="ignore"):  # of texts that are no numbers, no tables, no Python
            return float(scorer(answer, entry))
    except Exception:  # of any kind: prime_factorization, for one, fails on everything but numbers
        return _lowest(task, scorer, entry)


def _lowest(task: str, scorer: Scorer, entry: dict[str, Any]) -> float:
    """What an empty answer gets, 0 where the scorer cannot read that either; UserError if the entry is at fault."""
    try:
        scorer(entry["answer"], entry)
    except Exception as error:
        raise UserError(
            f"column 'gym_entry': reasoning-gym's scorer of {task!r} fails on the entry's own answer "
            f"({type(error).__name__}: {str(error)[:80]!r}): make the rows again with the installed version"
        ) from error
    try:
        return float(scorer("", entry))
    except Exception:
        return 0.0


def _read(task: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except ValueError as error:
            raise UserError(
                f"column 'gym_entry', a row of {task!r}: no JSON ({error}): give the dataset's entry"
            ) from None
    if not isinstance(entry, Mapping) or "answer" not in entry or "metadata" not in entry:
        raise UserError(f"column 'gym_entry', a row of {task!r}: give the dataset's entry (question, answer, metadata)")
    return dict(entry)


@lru_cache
def _scorer(task: str) -> Scorer:
    try:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn
    except ImportError as error:
        raise UserError("reward 'reasoning_gym_score' needs reasoning-gym: pip install 'gvpo[tasks]'") from error
    if task not in DATASETS:
        raise UserError(f"column 'gym_task': reasoning-gym has no {task!r}; {nearest(task, DATASETS)}")
    try:
        return get_score_answer_fn(task)  # pyright: ignore[reportReturnType]
    except AssertionError as error:
        raise UserError(f"column 'gym_task': {task!r} needs settings that cannot be given here ({error})") from error


# What may be evaluated


def _is_harmless(task: str, answer: str) -> bool:
    if task in _LITERALS:
        return _INERT.fullmatch(answer) is not None or _parsed(ast.literal_eval, answer) is not None
    if task in _EXPRESSIONS:
        return _PLAIN.fullmatch(answer) is not None and (_parsed(_size, answer) or _BITS) < _BITS
    return True


def _parsed(read: Callable[[str], Any], answer: str) -> Any:
    """What `read` makes of the answer; None where it is no Python, or is nested beyond what Python can read."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return read(answer)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
        return None


def _size(answer: str) -> float:
    """Bits of the largest number that can come up in an expression; ValueError for anything but arithmetic."""
    return _bits(ast.parse(answer.strip(), mode="eval").body)


def _bits(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(max(1, int(number).bit_length()))
        case ast.Name(id=name) if len(name) == 1 or name == "pi":
            return 1.0
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _bits(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return max(_bits(left), _bits(right)) + 1
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
            return _bits(left) + _bits(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bits(left) * 2 ** min(_bits(right), 20.0)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return 8.0 + _bits(argument)
        case _:
            raise ValueError("no arithmetic")
