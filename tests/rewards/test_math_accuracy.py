from __future__ import annotations

import logging
import random
import subprocess
import sys
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.rewards import equivalence
from gvpo.rewards import math as rewards_math
from gvpo.rewards.answers.finding import final_answers
from gvpo.rewards.equivalence import extract_answer, is_equivalent, readings
from gvpo.rewards.math import math_accuracy
from rewards.math_cases import CASES, Case


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_math, "is_worker", lambda: True)


def verdicts(cases: list[Case]) -> list[float | None]:
    return math_accuracy(completions=[case.completion for case in cases], answers=[case.answers for case in cases])


# The table


@pytest.mark.parametrize("group", CASES)
def test_the_table(group: str):
    wrong = [
        case for case, verdict in zip(CASES[group], verdicts(CASES[group]), strict=True) if verdict != float(case.right)
    ]
    assert not wrong


def test_the_table_is_large_and_has_both_verdicts():
    cases = [case for group in CASES.values() for case in group]
    assert len(cases) >= 180
    assert len(set(map(repr, cases))) == len(cases)
    assert min(sum(case.right for case in cases), sum(not case.right for case in cases)) >= 60


def test_the_quick_verdict_is_that_of_the_values(monkeypatch: pytest.MonkeyPatch):
    """Equal texts and plain numbers are compared without sympy; with it, every verdict is the same."""
    quick: list[tuple[str, str, bool]] = []
    original = equivalence._quickly

    def noted(answer: str, accepted: str) -> None:
        verdict = original(answer, accepted)
        if verdict is not None:
            quick.append((answer, accepted, verdict))

    monkeypatch.setattr(equivalence, "_quickly", noted)
    for cases in CASES.values():
        assert verdicts(cases) == [float(case.right) for case in cases]
    assert sum(verdict for *_, verdict in quick) > 30 < sum(not verdict for *_, verdict in quick)
    for answer, accepted, verdict in quick:
        assert equivalence._by_values(answer, accepted) == verdict, (answer, accepted)


def test_an_answer_equals_itself_in_any_box():
    for cases in CASES.values():
        for case in cases:
            for answer in case.answers:
                if "####" not in answer and "boxed" not in answer:
                    assert is_equivalent(answer, answer), answer
                    assert is_equivalent(f"${answer.replace('$', '')}$.", answer.replace("$", "")), answer


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        (r"\frac{1}{3}", "0.33333"),  # what is asked for has the precision
        ("0.333", "0.333"),
        ("6 m", "6"),
    ],
)
def test_equivalence_is_not_symmetric_where_one_side_is_asked_for(answer: str, accepted: str):
    assert is_equivalent(answer, accepted)
    assert is_equivalent(accepted, answer) is (answer == accepted)


# Finding


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Thus $\boxed{ \frac{1}{2} }$.", r"\frac{1}{2}"),
        ("#### 1,000 ", "1,000"),
        ("The answer is 1/2.", "1/2"),
        ("The answer is (C), as shown.", "(C)"),
        ("It costs $5 + $6 = $11.", "11"),
        ("In 2022-23 there were 12 apples and a pear.", "12"),
        ("a 5-year plan", "5"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        ("nothing here at all", None),
        ("", None),
        (r"\boxed{ }", None),
    ],
)
def test_the_final_answer_as_text(text: str, answer: str | None):
    assert extract_answer(text) == answer


def test_boxes_apart_are_read_as_one_answer_or_as_all():
    text = r"One root is \boxed{2}, by inspection. The other one is \boxed{3}."
    assert final_answers(text) == ["3", "2, 3"]
    assert verdicts([Case(text, ["3"], True, ""), Case(text, ["2,3"], True, ""), Case(text, ["2"], False, "")]) == [
        1.0,
        1.0,
        0.0,
    ]


# Rows


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [("5", 1.0), (5, 1.0), (5.0, 1.0), ([4, "5"], 1.0), (("5",), 1.0), ([4, 6], 0.0), (None, None), (0.5, 0.0)],
)
def test_accepted_answers_are_text_or_numbers_or_lists_of_them(answers: Any, verdict: float | None):
    assert math_accuracy(completions=[r"\boxed{5}"], answers=[answers]) == [verdict]


def test_arrays_of_answers():
    import numpy as np

    assert math_accuracy(completions=[r"\boxed{5}"], answers=[np.array(["4", "5"])]) == [1.0]
    assert math_accuracy(completions=[r"\boxed{5}"], answers=[np.int64(5)]) == [1.0]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ("", "'' holds no answer"),
        ("$ $", "holds no answer"),
        ([], "is empty"),
        (["5", ""], "'' holds no answer"),
        ({"a": 1}, "no string or number"),
        ([None], "no string or number"),
        (r"\boxed{", "holds no answer"),
    ],
)
def test_an_answer_that_is_none_is_the_users_to_mend(answers: Any, says: str):
    with pytest.raises(UserError, match=f"'math_accuracy': column 'answers': .*{says}"):
        math_accuracy(completions=["5"], answers=[answers])


def test_chat_completions_and_ids_alone():
    message = [{"role": "assistant", "content": r"\boxed{5}"}]
    assert math_accuracy(completions=[message], answers=["5"]) == [1.0]
    with pytest.raises(UserError, match="give a tokenizer"):
        math_accuracy(completions=None, answers=["5"])


# Hostile completions

HUGE = 100_000
MEGABYTE = 1_000_000
TOWER = "9^{9^{9^{9}}}"

LONG = {
    "backslashes": "\\" * MEGABYTE,
    "open braces": "{" * MEGABYTE,
    "open boxes": "\\boxed{" * HUGE,
    "a box of open braces": "\\boxed{" + "{" * 10_000,
    "boxes": "\\boxed{1} " * HUGE,
    "boxes with commas": "\\boxed{1} , " * HUGE,
    "phrases": "the answer is " * HUGE,
    "phrases and dollars": "the answer is $" * HUGE,
    "phrases and brackets": "the answer is \\[" * HUGE,
    "colons": "answer:" * HUGE,
    "dollars": "$" * MEGABYTE,
    "formulas": "\\[" * 500_000,
    "digits": "1" * MEGABYTE,
    "a box of digits": "\\boxed{" + "1" * MEGABYTE + "}",
    "a box of commas": "\\boxed{" + "1," * 500_000 + "}",
    "thoughts": "<think>" * HUGE + "</think>" * HUGE,
    "tags": "<answer>" * HUGE,
    "marks": "####" * 250_000,
    "white space": " " * MEGABYTE + "x",
    "ands": " and " * 200_000,
    "letters": "a " * 500_000,
    "one character that is many": "\\boxed{" + "\ufdfa" * 1_000 + "}",
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.usefixtures("deadline")
def test_long_completions_are_judged(name: str):
    assert math_accuracy(completions=[LONG[name]], answers=["7"]) == [0.0]


HOSTILE = [
    TOWER,
    f"-{TOWER}",
    f"2^{{-{TOWER}}}",
    rf"\frac{{1}}{{{TOWER}}}",
    rf"\sqrt[{TOWER}]{{2}}",
    f"(1,{TOWER})",
    rf"[1,{TOWER}] \cap [2,3]",
    rf"\{{1,{TOWER}\}} \cup (1,2)",
    f"x < {TOWER}",
    "9^9^9^9",
    "((9^{3000})^{3000})^{3000}",
    "99999999!",
    "((9!)!)!",
    "9!!!!!!!",
    "(999*999*999)!",
    r"\binom{1000000000}{500000000}",
    r"\binom{\binom{50}{20}}{\binom{40}{20}}",
    r"\Gamma(1000000000)",
    r"\sum_{k=1}^{1000000000} k",
    r"\operatorname{eye}(10000)",
    "zeros(100000)",
    r"\exp(\exp(\exp(\exp(3.015))))",
    r"\sin(2^{abcdefghijklmnopqrstuvwxyz})",
    r"\tan(\pi/2)",
    "1e999999999999",
    r"1 \times 10^{99999}",
    r"\frac{1}{" * 500 + "2" + "}" * 500,
    r"\sqrt{" * 100 + "2" + "}" * 100,
    r"\lfloor " * 8 + "2.5" + r"\rfloor " * 8,
    "(" * 400 + "1" + ")" * 400,
    "(1," * 100 + "1" + ")" * 100,
    r"\{" * 100 + "1" + r"\}" * 100,
    "x^" * 300 + "x",
    "x_" * 300 + "x",
    "|x|" * 100,
    r"\pm 1" * 100,
    r"\pm 1," * 150,
    "1=" * 300 + "1",
    "x<" * 300 + "1",
    r"\cup".join(["(1,2)"] * 80),
    r"\mathbb{R} \setminus" * 20 + r"\{1\}",
    r"\sin" * 40 + "x",
    "(x+1)" * 55,
    "5 " + "cm " * 300,
    "^(" * 400,
    r"\text{" * 150,
    r"\frac" * 180,
    "\x00\ud800",
    r"\begin{pmatrix}]",
    r"\binom{}{",
    "\u2248",
]


@pytest.mark.parametrize("accepted", ["7", "x^2+2x+1", r"(-\infty,1)\cup(2,\infty)", "0.123"])
@pytest.mark.usefixtures("deadline")
def test_hostile_answers_are_judged(accepted: str):
    assert not any(is_equivalent(answer, accepted) for answer in HOSTILE)


@pytest.mark.usefixtures("deadline")
def test_hostile_accepted_answers_are_compared_as_text():
    for accepted in HOSTILE:
        assert is_equivalent(accepted, accepted)
        assert not is_equivalent("x^2+2x+1", accepted)


PIECES = r"""
    1 2 x y i e E + - * / ^ _ { } ( ) [ ] | ! ' = < > \le , ; . % \% $ \$ \frac \frac{1}{2} \sqrt \sqrt[3] \pi \sin
    \log_ \text{ \text{cm} \infty \cup \in \mathbb{R} \setminus \{ \} \pm \mp \begin{pmatrix} \end{pmatrix} \\ &
    \lfloor \rfloor \binom{ \binom{5}{2} ^\circ ≈ √ ½ ² 10^{ e5 1,000 and or \left( \right) \boxed{ #### answer:is
    <think> </think> <answer> 9^{9^{9 }}} \cdot cm million (C) \gamma \dot{x}
"""


@pytest.mark.usefixtures("deadline")
def test_any_text_is_judged():
    """No exception, and no hang, for 1,500 texts of random pieces."""
    draw, pieces = random.Random(0), PIECES.split()
    for _ in range(1_500):
        text = draw.choice(["", " "]).join(draw.choices(pieces, k=draw.choice([2, 5, 12, 40])))
        assert is_equivalent(text, text)
        for accepted in ("7", "(1,2)", draw.choice(pieces)):
            is_equivalent(text, accepted)
        final_answers(text)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (r"\sqrt2 \approx 1.41", ["1.41"]),
        (r"\approx 1.41", []),
        (r"$\approx$ 1.41", []),
        (r"1.41 \approx", []),
        (r"\{1 \approx 1.41\}", []),
        (r"2 \approx 1.41", []),
        (r"1, 1.41 \approx 1.41", []),
    ],
)
def test_rounded_parts(answer: str, said: list[str]) -> None:
    assert [one.strip() for one in readings(answer, "1.41")] == [answer, *said]
    assert readings(answer, "7") == [answer]


@pytest.mark.usefixtures("deadline")
def test_repetitions_are_judged():
    """As a model that has lost its way writes them; where they end, a pattern without bounds would turn back."""
    draw, pieces = random.Random(0), [*PIECES.split(), " ", ", ", "12,", "1,728", ".5"]
    ends = ["", ",", ".", " =", "\n", "$", "(", "'", " apples"]
    assert final_answers("1,728,816,567 - 5,018,394,658 = 2,282,535,965,382,")
    assert final_answers("The sum is 1" + " " * 1_900 + "1abcd")
    assert not is_equivalent("x >" + " " * 400 + "and x <" + " " * 400 + "1=1", "7")
    assert not is_equivalent("5" + "a^2" * 100 + "+1", "7")
    assert not is_equivalent("(1," * 4_000, "(1,2)")
    assert len(final_answers("\\boxed{" * 100_000 + "}" * 100_000)) == 1
    assert is_equivalent(r"\sqrt{(n^2)!}", "((n^2)!)^{1/2}")
    assert not is_equivalent("(500n)!", "n")
    for _ in range(1_000):
        text = "".join(draw.choices(pieces, k=draw.choice([1, 2, 3]))) * draw.choice([12, 40, 300]) + draw.choice(ends)
        final_answers(text)
        is_equivalent(text, "7")
        is_equivalent("(1,2)", text)


def test_nothing_is_said_and_sympy_comes_late():
    """math-verify warns on its log that its time limits are off."""
    code = (
        "import sys, logging; logging.basicConfig(level=0); from gvpo.rewards.equivalence import is_equivalent as e;"
        "assert e('58,500', '58500') and 'sympy' not in sys.modules and 'math_verify' not in sys.modules;"
        r"assert e(r'\mathbb{R} \setminus \{1\}', r'(-\infty,1)\cup(1,\infty)') and 'math_verify' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_threads():
    """math-verify's own time limits are signals, which only the main thread can set."""
    from concurrent.futures import ThreadPoolExecutor

    pairs = [(rf"\frac{{{n}\sqrt{{3}}}}{{3}}", rf"\frac{{{n}}}{{\sqrt{{3}}}}") for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda pair: is_equivalent(*pair), pairs))
    assert logging.getLogger("math_verify").level == logging.NOTSET


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so it is $\boxed 2$.", "2", True),
        (r"$3+4=\boxed7$ ways.", "7", True),
        (r"$\boxed\frac12$", r"\frac{1}{2}", True),
        (r"$\boxed{\frac12}$, not $\boxed 3$", r"\frac12", False),
        (r"Put it in \boxed form: \boxed{3}. That is \boxed.", "3", True),
        ("I will use \\boxed\n\n1. Add.\nThe answer is 5.", "5", True),
        (r"\boxed{5} as I wrote it in \boxed a moment ago", "5", True),
        (r"I put it in \boxed \boxed{\frac{1}{2}}", "1/2", True),
        (r"$\boxed3\sqrt{2}$", "3", False),
        (r"\boxed{9_8}", "9", False),
        (r"\boxed{1012_2}", "1012", False),
        (r"\boxed{42_{99}}", "42", False),
        (r"\boxed{C_{16}}", "12", True),
        (r"\boxed{10^{6000}}", "10^{5000}", False),
        (r"\boxed{1e-5000}", "1e-6000", False),
        (r"\boxed{10^{6000}}", "10^{6000}", True),
        (r"\boxed{10^{3999}}", "1e3999", True),
        (r"\boxed{T}", "T_0", False),
        (r"\boxed{P}", "P_{1}", False),
        (r"\boxed{A}", "A_{11}", False),
        (r"\boxed{A_{11}}", "A_{11}", True),
        (r"\boxed{255}", "FF_{16}", False),
        (r"\boxed{5 \text{ degrees Celsius}}", r"5^\circ F", False),
        ("\\boxed{20\u2103}", r"20^\circ C", True),
        ("\\boxed{5 pounds}", "\u00a35", True),
        (r"\boxed{FF_{16}}", "255", True),
        ("\\boxed{\u20ac5}", r"\$5", False),
        ("\\boxed{\u20ac5}", "5 euros", True),
        ("\\boxed{-\u00a35}", "-5", True),
        (r"\boxed{5^\circ C}", r"5^\circ F", False),
        (r"\boxed{5^\circ C}", r"5^\circ", True),
        (r"\boxed{2 million million}", "2000000000000", True),
    ],
)
def test_what_readers_found(completion: str, answer: str, right: bool):
    assert math_accuracy(completions=[completion], answers=[answer]) == [float(right)]


def test_a_number_that_python_would_not_write_out():
    """26 factors of 10^12 beside 10^3999: more than 4,300 digits."""
    text = "10^{3999} " + "trillion " * 26
    assert math_accuracy(completions=[f"$\\boxed{{{text}}}$"] * 2, answers=["5", text]) == [0.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_what_is_no_answer(value: object):
    with pytest.raises(UserError, match=f"column 'answers': '{value}' is no"):
        math_accuracy(completions=["5"], answers=[value])


UNDONE = [
    # What a policy was seen to say, and what it might say next.
    ("State the final answer to the following arithmetic problem: 5 - 9 =", "-4", "5 - 9 = 4. \\boxed{5 - 9}", False),
    ("What is 5 - 9?", "-4", r"\boxed{5 - 9 = -4}", True),
    ("What is 5 - 9?", "-4", r"\boxed{5 + -9}", False),
    ("What is 5 - 9?", "-4", r"\boxed{x = 5-9}", False),
    ("What is 5 - 9?", "-4", r"\boxed{\{5 - 9\}}", False),
    ("What is 5 - 9?", "-4", r"\boxed{-4}", True),
    ("", "6", r"\boxed{2 \cdot 3}", False),
    ("", "6", r"\boxed{(2)\times 3 \text{ apples}}", False),
    ("", "3", r"\boxed{\frac{2 + 4}{2}}", False),
    ("", "(3, 4)", r"\boxed{(1 + 2, 4)}", False),
    # Numbers.
    ("What is 1 - 1/4?", "0.75", r"\boxed{\frac{6}{8}}", True),
    ("A coin shows heads with probability 1/2. And tails?", "0.5", r"\boxed{1/2}", True),
    ("", "2.5", r"\boxed{2\frac{1}{2}}", True),
    ("", "3 \\times 10^8", r"\boxed{300000000}", True),
    ("", "300000000", r"\boxed{3 \cdot 10^{8}}", True),
    ("How many subsets have ten elements?", "1024", r"\boxed{2^{10}}", True),
    ("", r"-\frac{20}{3}", r"\boxed{-(20/3)}", True),
    ("", r"-\frac{20}{3}", r"\boxed{(-20)/(3)}", True),
    ("", "72", r"\boxed{72 = 48 + 24}", True),
    ("", "72", r"\boxed{24 + 48 = 48 + 24}", False),
    # Formulas of the problem.
    ("Compute $2^{10}$.", "1024", r"\boxed{2^{10}}", False),
    ("Roll for each player, then compute $2^{10} = ?$", "1024", r"\boxed{2^{10}}", False),
    ("Compute $10/2$.", "5", r"\boxed{10/2}", False),
    (r"Reduce \(\frac{6}{8}\).", r"\frac{3}{4}", r"\boxed{\frac68}", False),
    (r"Find $\sin\frac{\pi}{6}$.", "0.5", r"\boxed{\sin\frac{\pi}{6}}", False),
    ("What is $5!$?", "120", r"\boxed{5!}", False),
    ("Write $101_2$ in base 10.", "5", r"\boxed{101_2}", False),
    (r"Find $\lfloor 7.5 \rfloor$.", "7", r"\boxed{\lfloor 7.5 \rfloor}", False),
    ("Expand $(x+1)^2$.", "x^2+2x+1", r"\boxed{(x + 1)^{2}}", False),
    ("Expand $(x+1)^2$.", "x^2+2x+1", r"\boxed{1 + 2x + x^2}", True),
    ("Factor $x^2-1$.", "(x-1)(x+1)", r"\boxed{x^2 - 1}", False),
    ("Factor $x^2-1$.", "(x-1)(x+1)", r"\boxed{x^2 - 1 = (x+1)(x-1)}", True),
    # Right answers that have something of the problem.
    (r"Which is larger, $\sqrt{2}$ or 1?", r"\sqrt{2}", r"\boxed{\sqrt{2}}", True),
    (r"A square of side $3\sqrt{2}$ cm. The side?", r"3\sqrt{2}", r"\boxed{3\sqrt{2}\text{ cm}}", True),
    (r"A square of side $3\sqrt{2}$ cm. The side?", r"3\sqrt{2}\text{ cm}", r"\boxed{3\sqrt{2}}", True),
    (r"$\textbf{(A)}$ $1$ $\textbf{(C)}$ $\frac{2}{4}$", "C", r"\boxed{\textbf{(C)}\ \frac{2}{4}}", True),
    (r"For $\theta$ in $[0,\frac{\pi}{2}]$", r"\pi/2", r"\boxed{\frac{\pi}{2}}", True),
    ("The tangent to $(x-1)e^{x-1}$", "x-y-1=0", r"\boxed{y=x-1}", True),
    ("Let $f(1/x) = x$.", r"f(x)=\frac{1}{x}", r"\boxed{f(x)=1/x}", True),
    (r"Let $|x| = \sqrt{2}$.", r"\pm\sqrt{2}", r"\boxed{\sqrt{2}, -\sqrt{2}}", True),
    (r"The point $1+\sqrt{3}i$", r"1+i\sqrt{3}", r"\boxed{1+\sqrt{3}i}", True),
    ("Let $y = x+10$. What is $x+1$ for $x = a$?", "a+1", r"\boxed{a + 1}", True),
    ("Is the curve symmetric about the x-axis or the y-axis?", "x-axis", r"\boxed{\text{the x-axis}}", True),
]


@pytest.mark.parametrize(("problem", "answer", "completion", "right"), UNDONE)
def test_an_operation_is_no_answer(problem: str, answer: str, completion: str, right: bool):
    message = [{"role": "user", "content": f"{problem}\nPut the final answer in \\boxed{{}}."}]
    for columns in ({"problem": [problem]}, {"prompts": [message]}, {"problem": [None], "prompts": [message]}):
        assert math_accuracy(completions=[completion], answers=[[answer]], **columns) == [float(right)]


def test_without_a_problem_only_arithmetic_is_refused():
    assert math_accuracy(completions=[r"\boxed{5 - 9}", r"\boxed{2^{10}}"], answers=["-4", "1024"]) == [0.0, 1.0]
