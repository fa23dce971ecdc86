"""What is evaluated on, and how it is drawn where nothing is said."""

from __future__ import annotations

import pytest

from gvpo.errors import UserError
from gvpo.evaluation.suite import Drawing, EvalTask, default_reward, task_names
from gvpo.sampling.sampler import SamplingParams
from gvpo.tasks import SUITES, Problem


@pytest.mark.parametrize(
    ("drawing", "task", "k", "temperature", "top_p"),
    [
        (Drawing(9), "amc", 1, 0.0, 1.0),
        (Drawing(9), "aime24", 32, 0.6, 0.95),
        (Drawing(9), "some/file.jsonl", 1, 0.0, 1.0),
        (Drawing(9, num_samples=1), "aime24", 1, 0.0, 1.0),
        (Drawing(9, num_samples=4), "amc", 4, 0.6, 0.95),
        (Drawing(9, temperature=1.0), "amc", 1, 1.0, 1.0),
        (Drawing(9, temperature=1.0, top_p=1.0), "aime24", 32, 1.0, 1.0),
    ],
)
def test_defaults_of_drawing(drawing: Drawing, task: str, k: int, temperature: float, top_p: float) -> None:
    assert drawing.of(task) == (k, SamplingParams(9, temperature, top_p))


def test_several_greedy_ones_would_be_alike() -> None:
    with pytest.raises(UserError, match="temperature 0 draws the same completion 32 times for 'aime24'"):
        Drawing(9, temperature=0.0).of("aime24")


def test_tasks_come_once_in_order() -> None:
    assert task_names(["math"], ["a.jsonl", "amc", "a.jsonl"]) == [*SUITES["math"], "a.jsonl"]


def test_who_judges() -> None:
    assert [default_reward(name) for name in ("amc", "a.jsonl", "gym:maze")] == [
        "math_accuracy",
        "math_accuracy",
        "reasoning_gym_score",
    ]


def test_rows_have_an_answer_for_every_reward() -> None:
    problems = [Problem("p", ["1", "2"], "t/0", "w"), Problem("q", ["3"], "t/1", "w", {"answer": "#### 3", "level": 5})]
    rows = EvalTask("t", problems, 1, SamplingParams(9), "exact_match").rows("plain")
    assert [row.columns for row in rows] == [
        {"answer": "1", "answers": ["1", "2"], "problem": "p", "id": "t/0"},
        {"answer": "#### 3", "answers": ["3"], "problem": "q", "id": "t/1", "level": 5},
    ]
    assert [(row.prompt, row.id) for row in rows] == [("p", "t/0"), ("q", "t/1")]


def test_settings_tell_other_problems_and_answers() -> None:
    def digest(text: str, answer: str, **columns: str) -> str:
        problem = Problem(text, [answer], "t/0", "w", columns)
        return EvalTask("t", [problem], 1, SamplingParams(9), "r").settings()["digest"]

    assert len({digest("p", "1"), digest("q", "1"), digest("p", "2"), digest("p", "1", tests="assert x")}) == 4
    assert digest("p", "1") == digest("p", "1")
