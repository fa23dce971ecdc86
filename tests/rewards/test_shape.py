from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import resolve_rewards, score_groups
from gvpo.rewards.shape import boxed_format, boxes, soft_length, think_format


def judged(function: Any, completion: Any, **columns: Any) -> float:
    (reward,) = function(completions=[completion], **columns)
    assert type(reward) is float
    return reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("so \\boxed{5}.", 1.0),
        ("\\boxed{\\frac{1}{2}}", 1.0),
        ("\\boxed{\\{1, 2\\}}", 1.0),
        ("\\boxed{\\left\\{1\\right.}", 1.0),  # an escaped brace closes nothing
        ("\\boxed {5}", 1.0),
        ("\\boxed{5} and \\frac{\\boxedly}{2}", 1.0),
        ("{\\boxed{5}}", 1.0),
        ("<think>\\boxed{4}?</think> \\boxed{5}", 1.0),
        ("<think>a</think> b</think> \\boxed{5}", 1.0),
        ("5", 0.0),
        ("", 0.0),
        ("\\boxed5", 0.0),
        ("\\boxed{}", 0.0),
        ("\\boxed{ {\n} }", 0.0),
        ("\\boxed{5", 0.0),
        ("\\boxed{5\\}", 0.0),
        ("\\boxed{4} or \\boxed{5}", 0.0),
        ("\\boxed{5} or \\boxed{6", 0.0),
        ("\\boxed{\\boxed{5}}", 0.0),
        ("a\\\\boxed{5}", 0.0),  # a line break and a word
        ("<think>\\boxed{4}?</think> 5", 0.0),
        ("<think>\\boxed{5}", 0.0),
        ("<think>a</think> <think> \\boxed{5}", 0.0),
    ],
)
def test_boxed_format(completion: str, reward: float):
    assert judged(boxed_format, completion) == reward


def test_boxes_are_read_outermost_and_in_order():
    assert boxes("\\boxed{a} {\\boxed{b{c}\\boxed{d}}} }") == ["a", "b{c}\\boxed{d}"]
    assert boxes("no") == []
    assert boxes("\\boxed{a} \\boxed{b") is None


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>hm</think>5", 1.0),
        ("\n<think>\nhm\n</think>\n\n5\n", 1.0),
        ("<think>hm</think>", 0.0),
        ("<think>hm</think> \n", 0.0),
        ("<think> </think>5", 0.0),
        ("<think></think>5", 0.0),
        ("so <think>hm</think>5", 0.0),
        ("hm</think>5", 0.0),
        ("<think>hm 5", 0.0),
        ("<think>a<think>b</think>5", 0.0),
        ("<think>a</think>b</think>5", 0.0),
        ("<think>a</think><think>b</think>5", 0.0),
        ("</think>5<think>", 0.0),
        ("<think>", 0.0),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(completion: str, reward: float):
    assert judged(think_format, completion) == reward


def test_a_thought_that_the_prompt_has_begun():
    for function in (partial(think_format, opened=True), partial(think_format, prompts=["2+2? <think>\n"])):
        assert judged(function, "hm</think>5") == 1.0
        assert judged(function, "<think>hm</think>5") == 0.0
        assert judged(function, "5") == 0.0
        assert judged(function, "") == 0.0
    said = [{"role": "user", "content": "what is <think>"}]
    assert judged(think_format, "hm</think>5", prompts=[said]) == 0.0


# max_length 10, window 4: 0 up to 6, then a quarter less with each.
@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (11, -1.0), (10**6, -1.0)]
)
def test_soft_length(length: int, reward: float):
    function = partial(soft_length, max_length=10, window=4)
    assert function(completions=None, completion_ids=[range(length)]) == [reward]
    assert function(completions=["a\n" * length], unit="words") == [reward]
    assert function(completions=["a" * length], unit="characters", completion_ids=[[1]]) == [reward]


def test_a_window_as_long_as_the_completion():
    assert soft_length(completions=None, completion_ids=[[], [1]], max_length=2, window=2) == [0.0, -0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4, "window": 5}, "1 <= window <= max_length"),
        ({"max_length": 4, "window": 0}, "1 <= window <= max_length"),
        ({"max_length": 4.5, "window": 1}, "two integers"),
        ({"max_length": [4], "window": [1]}, "two integers"),  # columns of that name
        ({"max_length": 4, "window": 1, "unit": "lines"}, "unit 'lines'"),
        ({"max_length": 4, "window": 1}, "have none: give unit='words'"),
    ],
)
def test_lengths_that_cannot_be_judged(options: Any, message: str):
    with pytest.raises(UserError, match=message):
        soft_length(completions=["a"], **options)


def test_all_are_called_as_the_trainer_calls_them():
    prompt = [{"role": "user", "content": "2+2?"}]
    group = Group(prompt, [Completion("<think>hm</think>\\boxed{4}", [1, 2, 3]), Completion("4", [1])])
    short = partial(soft_length, max_length=4, window=2)
    report = score_groups([group], resolve_rewards([boxed_format, think_format, short]), [1, 2, 4])
    assert report.rewards == [[1 + 2 + 4 * -0.5, 0.0]]


@pytest.mark.parametrize(
    "function", [boxed_format, think_format, partial(soft_length, max_length=2, window=1, unit="words")]
)
def test_without_texts_the_user_is_told(function: Any):
    with pytest.raises(UserError, match="give a tokenizer"):
        function(completions=None, completion_ids=[[1]])


HUGE = 200_000


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed" * HUGE,
        "\\boxed{" * HUGE,
        "\\boxed" + " " * HUGE,
        ("\\boxed" + " " * 500) * 500,
        "\\" * HUGE,
        "{" * HUGE,
        "\\boxed{" + "{}" * HUGE,
        "<think>" * HUGE,
        "</think>" * HUGE,
        "<think>a</think>" * HUGE,
        " " * HUGE,
    ],
    ids=lambda text: text[:16],
)
@pytest.mark.parametrize("function", [boxed_format, think_format])
@pytest.mark.usefixtures("deadline")
def test_huge_and_hostile_texts_are_judged(function: Any, text: str):
    assert judged(function, text) == 0.0
