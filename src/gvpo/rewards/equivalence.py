r"""Mathematical equivalence of two answers, and finding the answer in a completion.

What counts as equal is said in docs/verifiers.md. In short: exact values for exact answers (0.333 is not 1/3), decimals
as far as they are written; tuples in order, lists and sets in any; labels (`x =`), units and percent signs may be left
out; no conversion of units. Every step is bounded in the length of its input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gvpo.rewards.answers.finding import final_answers
from gvpo.rewards.answers.latex import LONGEST, compact, plain_latex, split
from gvpo.rewards.answers.numbers import (
    Number,
    Quantity,
    base_value,
    choice,
    in_base,
    plain_number,
    quantity,
    same_number,
    units_differ,
    without_label,
)
from gvpo.rewards.answers.reading import Answer, read, read_as_list

MOST_UNORDERED = 30  # values of a list in any order, where they are more than plain numbers


def extract_answer(text: str) -> str | None:
    """The completion's final answer as it was written (see `gvpo.rewards.answers.finding`); None where it has none."""
    return next(iter(final_answers(text)), None)


def is_equivalent(answer: str, accepted: str) -> bool:
    """Whether the answer says the same as the accepted one.

    Both as they were written, LaTeX or plain. Not symmetric: the precision, the labels and the units of the accepted
    answer are what is asked for.
    """
    first, second = read(answer), read(accepted)
    if answer == accepted or _same(first, second):
        return True
    # 100,200 is one number or two; whichever the other answer is.
    if second.kind == "leaf" and first.kind != "leaf" and "," in accepted:
        return _same(first, read_as_list(accepted))
    if first.kind == "leaf" and second.kind != "leaf" and "," in answer:
        return _same(read_as_list(answer), second)
    return False


def readings(answer: str, accepted: str) -> list[str]:
    """The answer, and what `exact \u2248 rounded` says where a decimal is accepted: the rounded part, if that is true.

    The answer by itself is the exact part. A rounded part that the exact one contradicts is none.
    """
    if len(answer) > LONGEST or not _APPROXIMATE.search(answer):
        return [answer]
    parts = split(plain_latex(answer), "\u2248")
    exact, rounded = parts[0], parts[-1]
    asked, given = _decimal(accepted), _decimal(rounded)
    if len(parts) == 1 or not asked or not given or not asked.unit or read(exact).kind not in ("leaf", "equation"):
        return [answer]
    from gvpo.rewards.answers import expression

    value = expression.real_value(quantity(exact.rpartition("=")[2].strip(), of_answer=True).core)
    true = value is None or abs(value - given.value) <= (given.unit or 1) / 2
    return [answer, rounded] if true else [answer]


_APPROXIMATE = re.compile(r"\u2248|\\(?:approx|simeq)")


def _decimal(text: str) -> Number | None:
    answer = read(text)
    value = answer.items[-1] if answer.kind == "equation" else answer
    return plain_number(quantity(value.text, of_answer=False).core)


# Structure


def _same(answer: Answer, accepted: Answer) -> bool:
    if answer.text and compact(answer.text) == compact(accepted.text):
        return True
    given, asked = _named(answer), _named(accepted)
    if given and given.keys() == asked.keys():
        return all(_same(given[name], asked[name]) for name in asked)
    if answer.kind == "equation" or accepted.kind == "equation":
        return _same_equation(answer, accepted)
    if answer.label and accepted.label and answer.label != accepted.label:
        return False
    kinds = (answer.kind, accepted.kind)
    if kinds == ("leaf", "leaf"):
        return _same_value(answer.text, accepted.text)
    if kinds == ("matrix", "matrix") or (kinds[0] in _ORDERED and kinds[1] in _ORDERED):
        return _brackets_fit(answer, accepted) and _in_order(answer.items, accepted.items)
    if answer.kind == "list" and _is_tuple(accepted):  # x = 1, y = 2 for the point (1, 2)
        return _in_order(_in_order_of_names(given) or answer.items, accepted.items)
    if answer.kind in ("list", "tuple", "interval") and asked and not given:
        return _in_order(answer.items, _in_order_of_names(asked) if _is_tuple(answer) else list(asked.values()))
    if "set" in kinds and set(kinds) <= {"set", "list", "leaf"}:
        return _as_sets(_parts(answer), _parts(accepted))
    if accepted.kind == "list" and answer.kind in ("list", "tuple", "leaf", "interval"):
        values = answer.items if _is_tuple(answer) else _parts(answer)
        return _any_order(values, accepted.items) or _by_algebra(answer, accepted)
    return _by_algebra(answer, accepted) if {"list", "set", "leaf"} & set(kinds) else False


_ORDERED = ("tuple", "interval")


def _is_tuple(answer: Answer) -> bool:
    """Whether it is a tuple or a point, as (1, 2) may be, and 1 < x < 2 not."""
    return answer.kind == "tuple" or (answer.kind == "interval" and answer.brackets == "()" and not answer.label)


def _named(answer: Answer) -> dict[str, Answer]:
    """The unknowns and their values in x = 1, y = 2 or (x, y) = (1, 2); empty where it is no such answer.

    Those of roots, x_1 = 1, x_2 = 2, and of functions, f(x) = x, are no unknowns: these come in any order.
    """
    if answer.kind == "equation" and answer.label.startswith("(") and len(answer.items) == 2:
        names, values = answer.label[1:-1].split(","), answer.items[-1].items
    elif answer.kind == "list" and all(item.kind == "equation" and item.label for item in answer.items):
        names, values = [item.label for item in answer.items], tuple(item.items[-1] for item in answer.items)
    else:
        return {}
    bases = {name.partition("_")[0] for name in names}
    alone = len(set(names)) == len(names) == len(values) == len(bases) > 1
    return dict(zip(names, values, strict=True)) if alone and not any("(" in name for name in names) else {}


def _in_order_of_names(named: Mapping[str, Answer]) -> list[Answer]:
    """Those of x, y, z and a, b, c, d in alphabetical order; others as they are written: r before \u03b8."""
    known = any(named.keys() <= set(letters) for letters in ("xyz", "abcd"))
    return [named[name] for name in (sorted(named) if known else named)]


def _parts(answer: Answer) -> tuple[Answer, ...]:
    return answer.items if answer.kind in ("list", "set") else (answer,)


def _brackets_fit(answer: Answer, accepted: Answer) -> bool:
    """Intervals need the same brackets; (1, 2) may be a point as well, and a vector is a tuple, [1, 2] a column too."""
    if answer.kind == accepted.kind == "interval":
        return answer.brackets == accepted.brackets
    if accepted.kind == "tuple" and answer.brackets == "[]" and not answer.label:
        return True
    return {answer.brackets, accepted.brackets} <= {"", "()"}


def _in_order(answers: Sequence[Answer], accepted: Sequence[Answer]) -> bool:
    return len(answers) == len(accepted) and all(map(_same, answers, accepted))


def _any_order(answers: Sequence[Answer], accepted: Sequence[Answer]) -> bool:
    if len(answers) != len(accepted) or not answers:
        return False
    if _in_order(answers, accepted):
        return True
    if len(accepted) > MOST_UNORDERED:
        return _sorted_texts(answers) == _sorted_texts(accepted)
    left = list(answers)
    for item in accepted:
        found = next((i for i, one in enumerate(left) if _same(one, item)), None)
        if found is None:
            return False
        del left[found]
    return True


def _sorted_texts(answers: Sequence[Answer]) -> list[str]:
    return sorted(compact(answer.text) for answer in answers)


def _as_sets(answers: Sequence[Answer], accepted: Sequence[Answer]) -> bool:
    if max(len(answers), len(accepted)) > MOST_UNORDERED:
        return set(_sorted_texts(answers)) == set(_sorted_texts(accepted))
    return all(any(_same(one, item) for one in answers) for item in accepted) and all(
        any(_same(one, item) for item in accepted) for one in answers
    )


# Equations


def _same_equation(answer: Answer, accepted: Answer) -> bool:
    """A label may be left out; where both sides are equations, their labels and values or their solutions are equal."""
    if answer.kind != "equation":
        return bool(accepted.label) and _same(answer, accepted.items[-1])
    if accepted.kind != "equation":
        return _same(_value_of(answer, accepted), accepted)
    if answer.label and answer.label == accepted.label:
        return _same(answer.items[-1], accepted.items[-1])
    sides = [tuple(compact(side.text) for side in equation.items) for equation in (answer, accepted)]
    if len(sides[0]) != 2 or len(sides[1]) != 2:
        return not answer.label and not accepted.label and _same(answer.items[-1], accepted.items[-1])
    from gvpo.rewards.answers import expression

    first, second = ((one.items[0].text, one.items[1].text) for one in (answer, accepted))
    return sides[0] == sides[1][::-1] or expression.same_equation(first, second)


def _value_of(equation: Answer, accepted: Answer) -> Answer:
    """The last side; its label, x, is that of an accepted interval that has one."""
    label = equation.label if accepted.label else ""
    return replace(equation.items[-1], label=label)


# Values


def _same_value(answer: str, accepted: str) -> bool:
    if (letter := choice(accepted)) is not None:
        return letter in (choice(answer), without_label(answer)[0])
    if choice(answer) is not None and len(compact(answer)) > 1:
        return False
    answer = without_label(answer)[1]
    if _is_text(accepted) or _is_text(answer):
        return _words(answer) == _words(accepted)
    if in_base(accepted) or in_base(answer):
        return _same_in_base(answer, accepted)
    return _same_quantity(quantity(answer, of_answer=True), quantity(accepted, of_answer=False))


def _is_text(text: str) -> bool:
    r"""Words: `\text{odd}`, Monday; not xy, which is a product."""
    inner = _inner_text(text)
    known = inner != text or re.search(r"[A-Za-z]{4}|^(?:yes|no|odd|all)$", text, re.IGNORECASE)
    return known is not None and re.fullmatch(r"[A-Za-z][A-Za-z '.-]*", inner) is not None


def _inner_text(text: str) -> str:
    match = re.fullmatch(r"\\text\{\s*([^{}]*?)\s*\}", text)
    return match[1] if match else text


def _words(text: str) -> str:
    return compact(re.sub(r"^(?:the|an?) ", "", _inner_text(text).casefold())).strip(".")


def _same_in_base(answer: str, accepted: str) -> bool:
    """52_8 is 52, the base being in the problem, and never 52_9; for an accepted answer without a base, its value."""
    given, asked = in_base(answer), in_base(accepted)
    if given and asked:
        return given == asked
    if asked:
        letter = len(asked[0]) == 1 and asked[0].isalpha()  # A_{11} may be a letter with an index
        return not letter and compact(answer).lstrip("0") == asked[0]
    number = plain_number(accepted)
    return given is not None and number is not None and base_value(*given) == number.value


def _same_quantity(answer: Quantity, accepted: Quantity) -> bool:
    if units_differ(answer, accepted):
        return False
    if answer.percent == accepted.percent:
        return _same_core(answer.core, accepted.core)
    given, asked = plain_number(answer.core), plain_number(accepted.core)
    if given and asked:
        # The question may have been "how many percent": then the sign is a unit. Below 1 it is a share.
        bare = abs(asked.value) >= 1 and same_number(given.value, asked)
        return bare or same_number(_hundredth(given, answer).value, _hundredth(asked, accepted))
    return _same_core(*(rf"\frac{{{one.core}}}{{100}}" if one.percent else one.core for one in (answer, accepted)))


def _hundredth(number: Number, of: Quantity) -> Number:
    if not of.percent:
        return number
    return Number(number.value / 100, None if number.unit is None else number.unit / 100)


def _same_core(answer: str, accepted: str) -> bool:
    quick = _quickly(answer, accepted)
    return _by_values(answer, accepted) if quick is None else quick


def _quickly(answer: str, accepted: str) -> bool | None:
    """The verdict where both are the same text, or plain numbers; it is that of `_by_values`, without sympy."""
    if compact(answer) == compact(accepted):
        return answer != ""
    given, asked = plain_number(answer), plain_number(accepted)
    return same_number(given.value, asked) if given and asked else None


def _by_values(answer: str, accepted: str) -> bool:
    from gvpo.rewards.answers import expression

    asked = plain_number(accepted)
    if asked and asked.unit is not None:
        value = expression.real_value(answer)
        return value is not None and same_number(value, asked)
    return expression.same_expression(answer, accepted)


def _by_algebra(answer: Answer, accepted: Answer) -> bool:
    """Sets in another form: R without a point, overlapping intervals."""
    if not (_SET_SIGN.search(answer.text) and _SET_SIGN.search(accepted.text)):
        return False
    from gvpo.rewards.answers import expression

    return expression.same_expression(answer.text, accepted.text)


_SET_SIGN = re.compile(r"\\(?:cup|cap|setminus|mathbb|emptyset|ne|le|ge)(?![A-Za-z])|[<>\[\]]|\A[^(]*+\([^,]*+,.*\)")
