r"""Prompt templates: what a model is given for a problem, a string or chat messages.

A string is tokenized as it stands, and a completion ends with the tokenizer's end token. Messages are rendered by the
tokenizer's own chat template, and a completion ends as an assistant turn does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gvpo.errors import UserError, nearest
from gvpo.tasks.problems import Problem

Prompt = str | list[dict[str, str]]

QWEN_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."

R1_OPENING = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)


def chat(problem: str) -> Prompt:
    r"""Messages, no system text: the problem, and on a new line the request to box the answer. For any chat model."""
    return _user(f"{problem}\nReason step by step and put the final answer in \\boxed{{}}.")


def verl_math(problem: str) -> Prompt:
    """Messages, no system text: what verl's preparation of MATH asks, and so the GVPO authors' script.

    Source: github volcengine/verl, examples/data_preprocess/math_dataset.py.
    """
    return _user(f"{problem} Let's think step by step and output the final answer within \\boxed{{}}.")


def qwen_math(problem: str) -> Prompt:
    """Messages with the system text of Qwen2.5-Math, for its chat template.

    Source: github QwenLM/Qwen2.5-Math, README (CoT).
    """
    return [{"role": "system", "content": QWEN_SYSTEM}, *_user(problem)]


def qwen_math_raw(problem: str) -> Prompt:
    """`qwen-math` as the string that its chat template makes, for base models: generation ends with their end token.

    Source: github QwenLM/Qwen2.5-Math, evaluation/utils.py, "qwen25-math-cot"; sail-sg/understand-r1-zero, "qwen_math".
    """
    turns = [("system", QWEN_SYSTEM), ("user", problem)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def r1(problem: str) -> Prompt:
    """A string: DeepSeek-R1-Zero's template as Dr. GRPO has it, which opens the <think>.

    Source: arXiv 2501.12948, table 1; github sail-sg/understand-r1-zero, "r1".
    """
    return f"{R1_OPENING}\nUser: {problem}\nAssistant: <think>"


def question(problem: str) -> Prompt:
    """A string: "Question: ... Answer:", as lm-evaluation-harness asks GSM8K. For base models."""
    return f"Question: {problem}\nAnswer:"


def plain(problem: str) -> Prompt:
    """A string: the problem alone.

    Source: github sail-sg/understand-r1-zero, "no".
    """
    return problem


TEMPLATES: dict[str, Callable[[str], Prompt]] = {
    "chat": chat,
    "verl-math": verl_math,
    "qwen-math": qwen_math,
    "qwen-math-raw": qwen_math_raw,
    "r1": r1,
    "question": question,
    "plain": plain,
}


def prompt_rows(problems: Iterable[Problem], template: str) -> list[dict[str, Any]]:
    """Rows that `read_rows` and the trainer take: `prompt`, `answers`, `answer` (the first of them, where the problems
    have no such column), `problem`, `id`, and the problems' columns.

    template: a key of TEMPLATES. Raises UserError for any other.
    """
    fill = find_template(template)
    return [_row(fill(one.text), one) for one in problems]


def find_template(name: str) -> Callable[[str], Prompt]:
    """The template of that name. Raises UserError naming the nearest one."""
    if name not in TEMPLATES:
        raise UserError(f"template {name!r}: no such template; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def _row(prompt: Prompt, one: Problem) -> dict[str, Any]:
    row = {"prompt": prompt, "answers": list(one.answers), "problem": one.text, "id": one.id}
    return row | {"answer": one.answers[0]} | one.columns | row  # first, and not to be overwritten


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
