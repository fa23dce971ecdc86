r"""Prompt templates: what a model is given for a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.tasks.problems import Problem

Prompt = str | list[dict[str, str]]


def chat(problem: str) -> Prompt:
    r"""Messages, without a system message: the problem and the request to box the answer."""
    text = f"{problem}\nReason step by step and put the final answer in \\boxed{{}}."
    return [{"role": "user", "content": text}]


def plain(problem: str) -> Prompt:
    """The problem alone, as a string."""
    return problem


TEMPLATES: dict[str, Callable[[str], Prompt]] = {"chat": chat, "plain": plain}


def prompt_rows(problems: Iterable[Problem], template: str) -> list[dict[str, Any]]:
    """Rows that `read_rows` and the trainer take: `prompt`, `answers`, `problem`, `id`, and the problems' columns.

    Raises UserError for an unknown template.
    """
    if template not in TEMPLATES:
        raise UserError(f"template {template!r}: no such template; {nearest(template, TEMPLATES)}")
    fill = TEMPLATES[template]
    return [
        {**one.columns, "prompt": fill(one.text), "answers": one.answers, "problem": one.text, "id": one.id}
        for one in problems
    ]
