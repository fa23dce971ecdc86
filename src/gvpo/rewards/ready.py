"""Ready-made rewards, each called as TRL calls a reward function; configs name them (`READY`).

Every function takes `completions` (strings, or message lists whose last message is the answer) and the column
`answer` (strings or numbers), one value per member, and returns 1.0 or 0.0 for each, or None where the answer is None
(the row lacks the column: another function's task). All are linear in the length of their texts.

Covered: plain numbers with a sign, thousands commas, a decimal point and an exponent; `$` and `%` are ignored, so 50%
equals 50. Not covered: fractions, words ("seventy-two") and expressions; for these take a verifier such as math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from gvpo.errors import UserError

Texts = Sequence[str | list[dict[str, Any]]]

# No alternative can fail after more than a bounded number of steps once a digit is seen, so a scan is linear. A minus
# that follows a word, a number or a bracket is an operator or a hyphen; a point that does is the end of a sentence.
_NUMBER = re.compile(
    r"""(?P<sign>(?<![\w)\]}])[-\u2212](?=\\?\$?[0-9.])\\?\$?)?
        (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)
        (?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?""",
    re.VERBOSE,
)
_BRACE = re.compile(r"[{}]")


def exact_match(*, completions: Texts | None, answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion equals the row's `answer`, both stripped of white space at their ends, else 0.0."""

    def matches(text: str, expected: Any) -> bool:
        return text.strip() == str(expected).strip()

    return _judged("exact_match", matches, completions, answer)


def last_number(*, completions: Texts | None, answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the last number in the completion equals the last number in the row's `answer`, exactly, else 0.0.

    Raises UserError for an answer that holds no number.
    """

    def matches(text: str, expected: Any) -> bool:
        return _last(text) == _expected("last_number", expected, _last)

    return _judged("last_number", matches, completions, answer)


def gsm8k_answer(*, completions: Texts | None, answer: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1.0 where the completion's final number equals that of the row's `answer` (whole GSM8K solutions too), else 0.0.

    The final number is the first one on the line after the last `####`, or the only one in the last `\boxed{}`,
    whichever marker comes later; where neither is present, the last number. A marker without its number is wrong.

    Raises UserError for an answer that holds no final number.
    """

    def matches(text: str, expected: Any) -> bool:
        return _final(text) == _expected("gsm8k_answer", expected, _final)

    return _judged("gsm8k_answer", matches, completions, answer)


READY: dict[str, Callable[..., list[float | None]]] = {
    function.__name__: function for function in (exact_match, last_number, gsm8k_answer)
}
"""Those that need neither a library nor a time limit, by name."""

POOLED = {
    "boxed_format": "gvpo.rewards.shape:boxed_format",
    "math_accuracy": "gvpo.rewards.math:math_accuracy",
    "reasoning_gym_score": "gvpo.rewards.gym:reasoning_gym_score",
    "think_format": "gvpo.rewards.shape:think_format",
}
"""Those that run in killable processes as other modules' do."""

BOUNDED = {
    "code_accuracy": "gvpo.rewards.code:code_accuracy",
    "judge_accuracy": "gvpo.rewards.judge:judge_accuracy",
}
"""Those with limits of their own: they start processes, or wait for a server, and are called where the run is."""


def problem_texts(problems: Sequence[Any] | None, prompts: Sequence[Any] | None, count: int) -> list[str]:
    """What each of `count` members was asked: its column `problem`, where that is null its prompt's last message."""
    nothing = [None] * count
    rows = zip(nothing if problems is None else problems, nothing if prompts is None else prompts, strict=True)
    asked = [prompt if problem is None else problem for problem, prompt in rows]
    return [completion_text(one) if isinstance(one, list) else str(one or "") for one in asked]


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of the last message (its text parts, joined)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _judged(
    name: str, matches: Callable[[str, Any], bool], completions: Texts | None, answers: Sequence[Any]
) -> list[float | None]:
    if completions is None:
        raise UserError(f"reward {name!r} reads texts, and these completions are token ids alone: give a tokenizer")
    return [
        None if answer is None else float(matches(completion_text(completion), answer))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def _expected(name: str, answer: Any, read: Callable[[str], Decimal | None]) -> Decimal:
    # Through str, so that the float 0.1 means what it shows and not its binary neighbour.
    number = read(str(answer))
    if number is None:
        raise UserError(f"reward {name!r}: the answer {str(answer)[:80]!r} holds no number: fix the column 'answer'")
    return number


def _final(text: str) -> Decimal | None:
    hashes, boxed = text.rfind("####"), text.rfind("\\boxed{")
    if hashes == boxed == -1:
        return _last(text)
    if hashes > boxed:
        line = text[hashes + len("####") :].lstrip().partition("\n")[0]
        match = _NUMBER.search(line)
        return _decimal(match) if match else None
    matches = list(_NUMBER.finditer(_in_braces(text, boxed + len("\\boxed{"))))
    return _decimal(matches[0]) if len(matches) == 1 else None


def _in_braces(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes the one before it, LaTeX's thousands marks made plain."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()].replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    return ""


def _last(text: str) -> Decimal | None:
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    return _decimal(match) if match else None


def _decimal(match: re.Match[str]) -> Decimal:
    """Exact: `Decimal` of a string is not rounded to the context's precision."""
    digits = match["digits"].replace(",", "") + (match["exponent"] or "")
    return Decimal(f"-{digits}" if match["sign"] else digits)
