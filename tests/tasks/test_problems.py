"""A row's problem and answers: what is read from which column, and what is refused how."""

from __future__ import annotations

from typing import Any

import pytest

from gvpo.errors import FieldError, UserError
from gvpo.tasks.problems import Problem, read_answers, read_problem


def read(row: Any) -> Problem:
    return read_problem(row, "set.jsonl, line 3", "set/2")


class TestAnswers:
    @pytest.mark.parametrize(
        ("column", "value", "answers"),
        [
            ("answers", ["1", "one "], ["1", "one"]),
            ("answers", "12", ["12"]),
            ("answers", [3, 2.5], ["3", "2.5"]),
            ("answer", 142.0, ["142"]),
            ("answer", -0.5, ["-0.5"]),
            ("answer", 2**70, [str(2**70)]),
            ("answer", 1e300, [str(int(1e300))]),
            ("answer", "025", ["025"]),  # AIME: a text stays as it is
            ("answer", "142.0", ["142.0"]),
            ("answer", "10,000", ["10,000"]),
            ("final_answer", ["$-2,0,2$"], ["$-2,0,2$"]),
            ("answer", "She has 10,000 = <<10*1000=10000>>10,000.\n#### 10,000", ["10000"]),
            ("solution", "so $x = \\boxed{\\frac{1}{2}}$.", ["\\frac{1}{2}"]),
            ("solution", "3 + 4 = 7\n#### 7", ["7"]),
        ],
    )
    def test_read(self, column: str, value: Any, answers: list[str]):
        assert read_answers(column, value) == answers

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("answers", [], "field 'answers': an empty list; give at least one accepted answer, or remove the row"),
            ("answers", ["1", " "], "field 'answers[1]': empty; give an accepted answer, or remove the row"),
            ("answers", [None], "field 'answers[0]': expected a text, got None; give an accepted answer, or"),
            ("answers", [["1"]], "field 'answers[0]': expected a text, got list; give"),
            ("answers", {"a": 1}, "field 'answers': expected a text, got dict; give"),
            ("answer", True, "field 'answer': expected a text, got True; give"),
            ("answer", "", "field 'answer': empty; give"),
            (
                "answer",
                float("nan"),
                "field 'answer': nan is non-finite; give the accepted answer as a text or a number",
            ),
            ("answer", "\ud800", "field 'answer': half of a surrogate pair at character 1; remove it"),
            ("answer", "no end ####", "field 'answer': a solution without an answer in \\boxed{} or after ####"),
            ("solution", "by symmetry, 7", "field 'solution': a solution without an answer in \\boxed{} or after ####"),
            ("solution", "\\boxed{7", "field 'solution': a solution without an answer in"),
        ],
    )
    def test_refused(self, column: str, value: Any, message: str):
        with pytest.raises(UserError) as error:
            read_answers(column, value)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{5} and then \\boxed{6}", "6"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("\\fbox{5}", "5"),
        ("so $\\boxed 5$.", "5"),
        ("$\\boxed\\pi$", "\\pi"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} units", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),  # \{ closes nothing and opens nothing
        ("\\boxed{ 5 }", "5"),
        ("#### 5\n#### 1,234,567\n", "1234567"),
        ("####-5", "-5"),
        ("#### (1,2)", "(1,2)"),
        ("#### 3, 4", "3, 4"),
        ("#### 72\n(checked in 2 ways)", "72"),
    ],
)
def test_solutions(solution: str, answer: str) -> None:
    """The answer is what `math_accuracy` reads in the solution as a completion."""
    assert read_answers("solution", solution) == read_answers("answer", solution) == [answer]


@pytest.mark.parametrize("answer", ["\\boxed{}", "\\boxed{5", "####"])
def test_what_holds_no_answer(answer: str) -> None:
    with pytest.raises(FieldError, match="without an answer"):
        read_answers("answer", answer)


@pytest.mark.parametrize("answer", ["=", "$$", ".", "for every real number"])
def test_what_an_answer_is_the_reward_says(answer: str) -> None:
    assert read_answers("answer", answer) == [answer]


@pytest.mark.parametrize("solution", ["\\boxedness{5}", "{5}", "5"])
def test_a_solution_needs_a_mark(solution: str) -> None:
    with pytest.raises(FieldError, match="a solution without an answer"):
        read_answers("solution", solution)


class TestRow:
    def test_the_first_columns_that_are_there_and_not_null(self):
        row = {"problem": None, "question": "2+2?", "answers": None, "answer": "4", "solution": "\\boxed{5}"}
        assert read(row) == Problem(
            "2+2?",
            ["4"],
            "set/2",
            "set.jsonl, line 3",
            {"problem": None, "answers": None, "solution": "\\boxed{5}"},
        )

    def test_columns_are_the_rest(self):
        row = {"problem": "p", "answer": 4, "level": 3, "prompt": "old", "completions": ["4"], "rewards": [1], "id": 9}
        assert read(row).columns == {"level": 3, "id": 9}

    def test_a_whole_solution_is_kept(self):
        gsm8k = read({"question": "2+2?", "answer": "2+2=4\n#### 4"})
        assert (gsm8k.answers, gsm8k.columns) == (["4"], {"solution": "2+2=4\n#### 4"})
        math = read({"problem": "2+2?", "solution": "$\\boxed{4}$", "level": "Level 1"})
        assert (math.answers, math.columns) == (["4"], {"level": "Level 1", "solution": "$\\boxed{4}$"})
        both = read({"question": "2+2?", "answer": "#### 4", "solution": "mine"})
        assert both.columns == {"solution": "mine"}

    def test_an_answer_with_spaces_is_no_solution(self):
        assert read({"problem": "p", "answer": " 4 "}).columns == {}

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([1], "set.jsonl, line 3: expected an object with 'problem' and 'answers', got [1]"),
            (
                {},
                "set.jsonl, line 3, field 'problem': missing (the row has nothing); give it as 'problem' or 'question'",
            ),
            ({"answer": "4"}, "set.jsonl, line 3, field 'problem': missing (the row has answer); give it as"),
            ({"question": None, "answer": "4"}, "set.jsonl, line 3, field 'question': null; give it as 'problem' or"),
            ({"problem": " ", "answer": "4"}, "set.jsonl, line 3, field 'problem': empty; give the problem statement"),
            ({"problem": 7, "answer": "4"}, "set.jsonl, line 3, field 'problem': expected a text, got 7; give the"),
            ({"problem": "a\udc00", "answer": "4"}, "set.jsonl, line 3, field 'problem': half of a surrogate pair at"),
            (
                {"problem": "p"},
                "set.jsonl, line 3, field 'answers': missing (the row has problem); give it as 'answers'",
            ),
            ({"problem": "p", "answer": None}, "set.jsonl, line 3, field 'answer': null; give it as 'answers' or"),
            (
                {"problem": "p", "answers": [""]},
                "set.jsonl, line 3, field 'answers[0]': empty; give an accepted answer",
            ),
        ],
    )
    def test_refused(self, row: Any, message: str):
        with pytest.raises(UserError) as error:
            read(row)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
