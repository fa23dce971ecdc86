from __future__ import annotations

from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import READY, resolve_rewards, score_groups
from gvpo.rewards.ready import completion_text, exact_match, gsm8k_answer, last_number


def judged(function: Any, completion: Any, answer: Any) -> float | None:
    (reward,) = function(completions=[completion], answer=[answer])
    assert type(reward) in (float, type(None))
    return reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "\tParis ", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("42", 42, 1.0),
        ("42.0", 42, 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_match(completion: str, answer: Any, reward: float | None):
    assert judged(exact_match, completion, answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 2 is 4.", "4"),
        ("it costs $1,234.50.", "1234.5"),
        ("it costs 1,234,567 dollars", "$1,234,567"),
        ("that makes 50%.", "50"),
        ("that makes 50\\%", "50%"),
        ("0.1", 0.1),
        ("0.30", "0.3"),
        (".5", "0.5"),
        ("3.0", 3),
        ("1e-7", 1e-07),
        ("2.5E3", 2500),
        ("x = -5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("-\\$5", "-5"),
        ("+5", "5"),
        ("10-5", "5"),  # a minus after a number is an operator
        ("10 - 5", "5"),
        ("(2)-5", "5"),
        ("GPT-4", "4"),
        ("-0", "0"),
        ("wait...5", "5"),
        ("so it is 1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("1,2,3", "3"),  # no thousands: a list
        ("12345678901234567890.000000000000000001", "12345678901234567890.000000000000000001"),
        ("4", "there are 4"),
        ("007", "7"),
    ],
)
def test_last_number_equal(completion: str, answer: Any):
    assert judged(last_number, completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("4, or is it 5?", "4"),
        ("no idea", "4"),
        ("", "4"),
        ("5", "-5"),
        ("0.5", "5"),
        ("1,23", "123"),
        ("50%", "0.5"),
        # Equal as floats, not as decimals.
        ("0.10000000000000000001", "0.1"),
        ("9007199254740993", "9007199254740992"),
        ("four", "4"),
    ],
)
def test_last_number_different(completion: str, answer: Any):
    assert judged(last_number, completion, answer) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("3 + 4 = 7\n#### 7", "She has 3 + 4 = <<3+4=7>>7.\n#### 7", 1.0),
        ("#### 1,000\nThat took 5 steps.", "#### 1000", 1.0),
        ("#### $72.00 for 3 boxes", "72", 1.0),
        ("####\n72", "72", 1.0),
        ("#### 5\nno, sorry:\n#### 6", "6", 1.0),
        ("#### 5\nno, sorry:\n#### 6", "5", 0.0),
        ("####\n\n\n", "72", 0.0),
        ("it is 72 #### seventy-two", "72", 0.0),
        ("so \\boxed{72} and 5 more words", "72", 1.0),
        ("so $\\boxed{\\$1{,}000\\text{ dollars}}$, page 5", "1000", 1.0),
        ("\\boxed{1\\,000}", "1,000", 1.0),
        ("\\boxed{-5}", "-5", 1.0),
        ("\\boxed{x = {7}} 8", "7", 1.0),
        ("\\boxed{5} then \\boxed{6}", "6", 1.0),
        ("\\boxed{6} #### 7", "7", 1.0),
        ("#### 7 \\boxed{6}", "6", 1.0),
        ("\\boxed{\\frac{1}{2}}", "2", 0.0),  # no plain number
        ("\\boxed{\\frac{1}{2}}", "1", 0.0),
        ("\\boxed{1, 2, 3}", "3", 0.0),
        ("\\boxed{}", "72", 0.0),
        ("72 \\boxed{72", "72", 0.0),  # never closed
        ("the answer is 72", "#### 72", 1.0),
        ("the answer is 72", "#### 73", 0.0),
        ("the answer is 72", "\\boxed{72}", 1.0),
        ("72", None, None),
    ],
)
def test_gsm8k_answer(completion: str, answer: Any, reward: float | None):
    assert judged(gsm8k_answer, completion, answer) == reward


def test_last_number_looks_past_the_markers():
    assert judged(last_number, "#### 1\nThat took 5 steps.", "5") == 1.0


@pytest.mark.parametrize("function", [last_number, gsm8k_answer])
def test_an_answer_without_a_number_is_the_users_to_mend(function: Any):
    with pytest.raises(UserError, match=f"'{function.__name__}': the answer 'seven' holds no number"):
        function(completions=["7"], answer=["seven"])
    assert judged(function, "7", None) is None


@pytest.mark.parametrize("function", READY.values())
def test_message_lists(function: Any):
    say = {"role": "assistant", "content": "7"}
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert function(completions=[[say], [call, {"role": "tool", "content": "1"}, say]], answer=["7", 7]) == [1.0, 1.0]
    assert function(completions=[[call]], answer=["7"]) == [0.0]


def test_the_text_of_a_completion():
    parts = [{"type": "text", "text": "4"}, {"type": "image", "image": object()}, {"type": "text", "text": "2"}]
    assert completion_text("plain") == "plain"
    assert (
        completion_text([{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "last"}]) == "last"
    )
    assert completion_text([{"role": "assistant", "content": parts}]) == "42"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""


@pytest.mark.parametrize("name", READY)
def test_all_are_called_as_the_trainer_calls_them(name: str):
    groups = [
        Group("3+4?", [Completion("7"), Completion("8")], columns={"answer": "7", "level": 1}),
        Group([{"role": "user", "content": "3+5?"}], [Completion("8")], columns={"answer": "8"}),
        Group("Sing!", [Completion("La")], columns={"level": 2}),
    ]
    report = score_groups(groups, resolve_rewards(name), None)
    assert report.rewards == [[1.0, 0.0], [1.0], [None]]
    assert READY[name].__doc__


@pytest.mark.parametrize("name", READY)
def test_without_texts_or_answers_the_user_is_told(name: str):
    ids = Group(None, [Completion(token_ids=[1])], prompt_ids=[1], columns={"answer": "1"})
    with pytest.raises(UserError, match=f"'{name}' reads texts.*give a tokenizer"):
        score_groups([ids], resolve_rewards(name), None)
    with pytest.raises(UserError, match=f"'{name}' needs 'answer'"):
        score_groups([Group("p", [Completion("1")])], resolve_rewards(name), None)


HUGE = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "1" * HUGE,
        "1," * HUGE,
        "111," * HUGE,
        "1,111" * HUGE,
        "-" * HUGE,
        "-$" * HUGE,
        "." * HUGE,
        ".1" * HUGE,
        "1.1e" * HUGE,
        "{" * HUGE,
        "\\boxed{" * HUGE,
        "\\boxed{" + "{1}" * HUGE,
        "\\boxed{" + "1," * HUGE + "}",
        "####" * HUGE,
        "####" + " " * HUGE,
        "####" + "$-," * HUGE,
        " " * HUGE + "x",
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("function", READY.values())
@pytest.mark.usefixtures("deadline")
def test_huge_and_hostile_texts_are_judged(function: Any, text: str):
    assert judged(function, text, "7") == 0.0


def test_long_numbers_are_compared_exactly():
    digits = "12345678901" * 9000
    assert judged(last_number, f"so {digits}.", digits) == 1.0
    assert judged(last_number, f"so {digits}.", digits[:-1] + "2") == 0.0
