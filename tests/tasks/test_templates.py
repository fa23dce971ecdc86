"""Templates: the exact texts of their sources, and rows that the trainer takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gvpo.errors import UserError
from gvpo.sources.dataset import read_rows
from gvpo.tasks import TEMPLATES, Problem, prompt_rows
from gvpo.training.data_checks import check_columns

USER = {"role": "user"}

# By hand from the sources that the templates name, for the problem "What is {1}+1?".
EXPECTED = {
    "chat": [{**USER, "content": "What is {1}+1?\nReason step by step and put the final answer in \\boxed{}."}],
    "verl-math": [
        {
            **USER,
            "content": "What is {1}+1? Let's think step by step and output the final answer within \\boxed{}.",
        }
    ],
    "qwen-math": [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {**USER, "content": "What is {1}+1?"},
    ],
    "qwen-math-raw": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\nWhat is {1}+1?<|im_end|>\n<|im_start|>assistant\n",
    "r1": "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. The "
    "reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: What is {1}+1?\nAssistant: <think>",
    "question": "Question: What is {1}+1?\nAnswer:",
    "plain": "What is {1}+1?",
}


def test_every_template():
    assert {name: template("What is {1}+1?") for name, template in TEMPLATES.items()} == EXPECTED


def test_the_raw_form_is_the_rendered_one():
    """Qwen2.5's chat template writes each message so, then opens the assistant's turn."""
    messages = TEMPLATES["qwen-math"]("p")
    rendered = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    assert TEMPLATES["qwen-math-raw"]("p") == rendered + "<|im_start|>assistant\n"


PROBLEMS = [
    Problem("2+2?", ["4", "four"], "set/0", "set.jsonl, line 1", {"level": 1, "id": 60, "solution": "2+2=4"}),
    Problem("3+3?", ["6"], "set/1", "set.jsonl, line 2", {"level": 2, "id": 61, "solution": "3+3=6"}),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_are_what_the_trainer_reads(template: str, tmp_path: Path):
    rows = prompt_rows(PROBLEMS, template)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (read_rows(rows), read_rows(path)):
        check_columns(read)
        assert [row.prompt for row in read] == [TEMPLATES[template](one.text) for one in PROBLEMS]
        assert read[0].columns == {
            "answers": ["4", "four"],
            "answer": "4",
            "problem": "2+2?",
            "id": "set/0",  # the problem's, not the column of that name
            "level": 1,
            "solution": "2+2=4",
        }
        assert not any(row.offline for row in read)


def test_rows_share_nothing():
    rows = prompt_rows(PROBLEMS, "chat")
    rows[0]["answers"].append("5")
    assert PROBLEMS[0].answers == ["4", "four"]


def test_unknown_template():
    with pytest.raises(UserError, match=r"^template 'qwen_math': no such template; did you mean 'qwen-math'\?$"):
        prompt_rows(PROBLEMS, "qwen_math")
