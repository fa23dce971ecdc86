r"""Rewards for the shape of a completion, not for what it says: boxes, thoughts, length.

Give them a small weight beside a reward for the answer (`reward_weights`): alone they teach the shape and nothing
else. All are linear in the length of their texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.ready import Texts, completion_text

# A backslash takes the character after it along: \{ and \} are no braces, and \\boxed is a line break and a word.
_BOX = re.compile(r"\\boxed[ \t]*\{|\\.|[{}]", re.DOTALL)


def boxed_format(*, completions: Texts | None, **columns: Any) -> list[float | None]:
    r"""1.0 where exactly one `\boxed{...}` stands after the last `</think>`, closed and not empty, else 0.0.

    Empty is a box that holds white space and braces alone. Where a `<think>` is not closed, all is thought: 0.0.
    """
    return _judged("boxed_format", _has_one_box, completions)


def think_format(
    *, completions: Texts | None, prompts: Sequence[Any] | None = None, opened: bool = False, **columns: Any
) -> list[float | None]:
    """1.0 where a completion is `<think>`, a thought, `</think>` and an answer, neither of them empty, else 0.0.

    Each tag occurs once, and the first one begins the completion. It must be missing where the prompt has it already:
    where a prompt that is a string ends with `<think>`, or with `opened` (chat templates that begin the answer so;
    `functools.partial(think_format, opened=True)`).
    """
    if completions is None:
        raise _no_texts("think_format")
    asked = prompts if prompts is not None else [None] * len(completions)
    return [
        float(_thinks(completion_text(completion), opened or _is_opened(prompt)))
        for completion, prompt in zip(completions, asked, strict=True)
    ]


def soft_length(
    *,
    completions: Texts | None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    max_length: int,
    window: int,
    unit: str = "tokens",
    **columns: Any,
) -> list[float | None]:
    """DAPO's soft punishment of overlong completions: 0 up to `max_length - window`, down to -1 at `max_length`.

    With n the length, (max_length - window - n) / window in between, and -1 beyond. Source: arXiv 2503.14476, eq. 13.

    max_length, window: in `unit`s, 1 <= window <= max_length. For rollouts, max_length is mostly the config's
        max_completion_length, and window a fifth of it (the paper: 20480 and 4096).
    unit: "tokens", the ids of the completion, its end token included; no text is needed. "words" (what white space
        divides) or "characters" of the text, where there are no ids.
    A config names it through a module of the user's: `reward_funcs: rewards:short`, where rewards.py has the line
    `short = functools.partial(soft_length, max_length=512, window=128)`.

    Raises UserError for other values, and without the ids or the texts that `unit` counts.
    """
    if not (type(max_length) is type(window) is int and 1 <= window <= max_length):
        raise UserError(
            f"reward 'soft_length': max_length {max_length!r} and window {window!r}: give two integers, "
            "1 <= window <= max_length"
        )
    lengths = _lengths(unit, completions, completion_ids)
    return [min(0.0, max(-1.0, (max_length - window - length) / window)) for length in lengths]


def boxes(text: str) -> list[str] | None:
    r"""What is in each outermost `\boxed{...}` of the text, in order; None where one of them is never closed."""
    found: list[str] = []
    start, depth = -1, 0
    for token in _BOX.finditer(text):
        if start < 0:
            start, depth = (token.end(), 1) if token[0].startswith("\\boxed") else (start, 0)
        elif token[0].endswith("{") and token[0] != "\\{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                found.append(text[start : token.start()])
                start = -1
    return found if start < 0 else None


def after_thought(text: str) -> str:
    """What follows the last `</think>`; all of the text where there is none, and nothing of a thought without end."""
    answer = text.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def _has_one_box(text: str) -> bool:
    found = boxes(after_thought(text))
    return found is not None and len(found) == 1 and bool(found[0].strip("{} \t\n")) and "\\boxed" not in found[0]


def _is_opened(prompt: Any) -> bool:
    return isinstance(prompt, str) and prompt.rstrip().endswith("<think>")


def _thinks(text: str, opened: bool) -> bool:
    text = text.strip()
    if text.startswith("<think>") == opened:
        return False
    thought, closing, answer = text.removeprefix("<think>").partition("</think>")
    once = "<think>" not in thought and "<think>" not in answer and "</think>" not in answer
    return bool(closing and thought.strip() and answer.strip()) and once


def _lengths(unit: str, completions: Texts | None, completion_ids: Sequence[Sequence[int]] | None) -> list[int]:
    if unit == "tokens":
        if completion_ids is None:
            raise UserError("reward 'soft_length' counts token ids, and these completions have none: give unit='words'")
        return [len(ids) for ids in completion_ids]
    if unit not in ("words", "characters"):
        raise UserError(f"reward 'soft_length': unit {unit!r}: give 'tokens', 'words' or 'characters'")
    if completions is None:
        raise _no_texts("soft_length")
    texts = [completion_text(completion) for completion in completions]
    return [len(text.split()) if unit == "words" else len(text) for text in texts]


def _judged(name: str, judge: Callable[[str], bool], completions: Texts | None) -> list[float | None]:
    if completions is None:
        raise _no_texts(name)
    return [float(judge(completion_text(completion))) for completion in completions]


def _no_texts(name: str) -> UserError:
    return UserError(f"reward {name!r} reads texts, and these completions are token ids alone: give a tokenizer")
