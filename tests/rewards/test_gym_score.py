from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import gym, resolve_rewards, score_groups
from gvpo.rewards.gym import gym_answer, reasoning_gym_score

reasoning_gym = pytest.importorskip("reasoning_gym")

EVALUATED = ["binary_matrix", "n_queens", "spiral_matrix", "string_insertion"]
PARSED = ["countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"]


def entry_of(task: str) -> dict[str, Any]:
    return reasoning_gym.create_dataset(task, size=1, seed=0)[0]


def judged(task: Any, entry: Any, text: Any) -> float | None:
    (score,) = reasoning_gym_score(completions=[text], gym_task=[task], gym_entry=[entry])
    return score


@pytest.mark.parametrize(
    ("text", "lines", "answer"),
    [
        ("so <answer>5</answer>.", 1, "5"),
        ("<answer>4</answer> no: <answer>\n5\n</answer> \\boxed{6}", 1, "5"),
        ("<answer>4 <answer>5</answer>", 1, "5"),
        ("<think><answer>4</answer></think>\n\\boxed{5}", 1, "5"),
        ("<think>or 4?</think>5", 1, "5"),
        ("<answer>5", 1, "5"),
        ("5</answer>", 1, "5</answer>"),
        ("so \\boxed{\\frac{1}{2}}. Done.", 1, "\\frac{1}{2}"),
        ("so \\boxed{4}, no: \\boxed{5}", 1, "5"),
        ("so \\boxed{5", 1, "so \\boxed{5"),
        ("It is:\n\n1 2\n\n3 4\n\n", 2, "1 2\n3 4"),
        ("It is:\n5 \n", 1, "5"),
        ("1 2", 2, "1 2"),
        ("", 3, ""),
        ("<think>5", 1, ""),
    ],
)
def test_which_text_is_the_answer(text: str, lines: int, answer: str):
    assert gym_answer(text, lines) == answer


def test_a_scorer_with_one_right_answer():
    entry = {"question": "2+2?", "answer": "4", "metadata": {}}
    # reasoning-gym's own rule: the share of the answer that the right one makes up.
    assert judged("chain_sum", entry, "<answer>4</answer>") == 1.0
    assert judged("chain_sum", entry, "I say\n4") == 1.0
    assert judged("chain_sum", entry, "<answer>is 4</answer>") == 1 / 4
    assert judged("chain_sum", entry, "<answer>5</answer>") == 0.0
    assert judged("chain_sum", entry, "") == 0.0
    assert judged("chain_sum", json.dumps(entry), "4") == 1.0
    assert judged("chain_sum", entry, [{"role": "assistant", "content": "\\boxed{4}"}]) == 1.0


def test_a_scorer_of_its_own():
    entry = {"answer": "6 / (1 - 3 / 4)", "metadata": {"numbers": [6, 1, 3, 4], "target": 24}}
    assert judged("countdown", entry, "<answer>6/(1 - 3/4)</answer>") == 1.0
    assert judged("countdown", entry, "<answer>6*4*1*1</answer>") == 0.05  # other numbers
    assert judged("countdown", entry, "<answer>none</answer>") == 0.01


def test_an_answer_that_the_scorer_cannot_read_is_wrong():
    entry = {"answer": "2 \u00d7 3", "metadata": {"number": 6, "factors": [2, 3]}}
    assert judged("prime_factorization", entry, "2 \u00d7 3") == 1.0
    nothing = judged("prime_factorization", entry, "")
    assert nothing is not None and nothing < 0.1
    assert judged("prime_factorization", entry, "two times three") == nothing  # reasoning-gym raises ValueError


@pytest.mark.usefixtures("deadline")
def test_scorers_take_the_right_answer_and_a_long_one():
    without_answer = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
    # A part of them, for time; the scorers that evaluate have tests of their own.
    for name in [
        "prime_factorization",
        "polynomial_equations",
        *sorted(reasoning_gym.factory.DATASETS.keys() - {"composite"})[::6],
    ]:
        entry = entry_of(name)
        if name not in without_answer:
            assert judged(name, entry, f"<answer>{entry['answer']}</answer>") == 1.0, name
        score = judged(name, entry, "<answer>" + "1," * 4_000 + "</answer>")
        assert score is not None and 0 <= score <= 1, name


@pytest.mark.parametrize(
    "text",
    [
        "1 " * 500_000,
        "[" * 1_000_000,
        "<answer>" * 125_000,
        "</answer>" * 125_000,
        "\n" * 1_000_000,
        "\\boxed{" * 100_000,
    ],
    ids=lambda text: text[:8],
)
@pytest.mark.usefixtures("deadline")
def test_huge_and_hostile_texts_are_judged(text: str):
    for task in ("chain_sum", "spiral_matrix", "countdown"):
        assert judged(task, entry_of(task), text) in (0.0, 0.01)


def test_no_scorer_that_evaluates_is_unknown():
    evaluating = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
    theirs = {
        name
        for name, (dataset, _) in reasoning_gym.factory.DATASETS.items()
        if evaluating.search(inspect.getsource(dataset.score_answer))
    }
    # number_sorting evaluates its own entry; propositional_logic calls a parser of its own.
    assert theirs - {"number_sorting", "propositional_logic"} == {*EVALUATED, *PARSED}
    assert {*EVALUATED, *PARSED} == gym._LITERALS | gym._EXPRESSIONS


@pytest.mark.parametrize("task", [*EVALUATED, *PARSED])
def test_right_answers_of_scorers_that_evaluate(task: str):
    for entry in reasoning_gym.create_dataset(task, size=3, seed=1):
        # An integral that sympy cannot solve: reasoning-gym's scorer takes the question for its answer.
        expected = 0.0 if "Integral" in entry["answer"] else 1.0
        assert judged(task, entry, f"<answer>{entry['answer']}</answer>") == expected


def test_the_question_is_no_answer():
    entry = {"answer": "x**3/3 + C", "metadata": {"variable": "x", "integrand": "x**2"}}
    assert reasoning_gym.get_score_answer_fn("intermediate_integration")("Integral(x**2, x)", entry) == 1.0
    assert judged("intermediate_integration", entry, "Integral(x**2, x)") == 0.0


@pytest.mark.parametrize("task", [*EVALUATED, *PARSED])
def test_no_completion_is_run(task: str, tmp_path: Path):
    entry, trace = entry_of(task), tmp_path / "trace"
    touch = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    for attack in (touch, f"[{touch}]", f"[[0, {touch}]]", f"f'{{{touch}}}'", f"S('{touch}')", f"(x := {touch})"):
        # What an empty answer gets, and not the least more.
        assert judged(task, entry, f"<answer>{attack}</answer>") in (0.0, 0.01)
        assert not trace.exists()


@pytest.mark.parametrize("task", [*EVALUATED, *PARSED])
@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "((9**99)**99)**99**9",
        "9**(9*9*9*9*9*9*9*9*9)",
        "99999999!",
        "factorial(99999999)",
        "1e999",
        "N(pi, 1000000000)",
        "[a for a in '" + "x" * 2000 + "' for b in '" + "x" * 2000 + "' for c in '" + "x" * 2000 + "']",
        "(" * 500 + ")" * 500,
        "-" * 1900 + "1",
        "x" * 1900,
        "1 +\n1",
        "\x00",
        "\u00e9",
    ],
    ids=lambda answer: answer[:12],
)
@pytest.mark.usefixtures("deadline")
def test_hostile_expressions_are_judged(task: str, answer: str):
    assert judged(task, entry_of(task), f"<answer>{answer}</answer>") in (0.0, 0.01, 0.05)


def test_partial_credit_for_lists_is_kept():
    entry = {"answer": "1 2", "metadata": {}}
    assert judged("spiral_matrix", entry, "<answer>[1, 2]</answer>") == 0.1
    assert judged("spiral_matrix", entry, "<answer>(1, 2)</answer>") == 0.1
    assert judged("spiral_matrix", entry, "<answer>1 2</answer>") == 1.0


def test_expressions_in_other_forms():
    integral = {"answer": "x**3/3 + C", "metadata": {"variable": "x", "integrand": "x**2"}}
    assert judged("simple_integration", integral, "C - 1 + x*(x**2)/3") == 1.0
    assert judged("simple_integration", integral, "x**3/3 + x") == 0.0
    powers = {"answer": "sin(x)", "metadata": {"variable": "x", "integrand": "exp(2*x) + cos(x)*1.0"}}
    assert judged("intermediate_integration", powers, "exp(2*x)/2 + sin(x)") == 1.0
    product = {"answer": "x**2 - 1", "metadata": {}}
    assert judged("polynomial_multiplication", product, "-1 + x**2") == 1.0
    terms = " + ".join(f"{i}*x**{i}*y**2" for i in range(1, 200))
    assert len(terms) > 2000 or judged("polynomial_multiplication", {"answer": terms, "metadata": {}}, terms) == 1.0


@pytest.mark.parametrize(
    ("task", "entry", "message"),
    [
        ("chain_summ", {"answer": "4", "metadata": {}}, "no 'chain_summ'; did you mean 'chain_sum'"),
        ("composite", {"answer": "4", "metadata": {}}, "needs settings"),
        ("chain_sum", "4", "give the dataset's entry"),
        ("chain_sum", "{", "no JSON"),
        ("chain_sum", {"answer": "4"}, "give the dataset's entry"),
        ("prime_factorization", {"answer": "six", "metadata": {}}, "fails on the entry's own answer"),
    ],
)
def test_rows_that_cannot_be_judged(task: str, entry: Any, message: str):
    with pytest.raises(UserError, match=message):
        judged(task, entry, "six")


def test_it_is_called_as_the_trainer_calls_it():
    columns = {"gym_task": "chain_sum", "gym_entry": {"question": "2+2?", "answer": "4", "metadata": {}}}
    groups = [Group("2+2?", [Completion("4"), Completion("5")], columns=columns), Group("Sing!", [Completion("La")])]
    assert score_groups(groups, resolve_rewards(reasoning_gym_score), None).rewards == [[1.0, 0.0], [None]]
    with pytest.raises(UserError, match="give a tokenizer"):
        reasoning_gym_score(completions=None, gym_task=["chain_sum"], gym_entry=[columns["gym_entry"]])
