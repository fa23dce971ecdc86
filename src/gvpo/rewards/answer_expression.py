r"""Expressions: two are equal where they have the same values. Parsed by math-verify's parser, compared to 40 digits.

math-verify compares by `simplify`, which has no bound on its time and proves little about trigonometric or nested
forms. Here both sides are evaluated with 50 digits at fixed, irregular points, each once (the values are kept), and
agree to 40 digits or are different. Two answers that agree there and are not equal would have to be made for it. What
has no values, sets and relations, goes to `math_verify.verify`, its time limits off: they are signals, and fail outside
the main thread.

Nothing is handed to the parser that could take long: `affordable` looks at the text alone. This module imports sympy.
"""

from __future__ import annotations

import math
import re
import zlib
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import math_verify.grader
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from gvpo.rewards.answer_latex import closing

DIGITS = 50  # of every value
AGREE = Decimal("1e-40")  # relative difference of values that count as equal
NOTHING = Decimal("1e-90")  # below it a value is zero: what cancellation leaves
POINTS = 4

Value = tuple[Decimal, Decimal]  # real and imaginary part

math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # its warning that its time limit is off


def same_expression(answer: str, accepted: str) -> bool:
    """Whether two single values in plain LaTeX are equal; False where either cannot be read, or is too large to be."""
    if _expression(answer) is None or _expression(accepted) is None:
        return False
    values, expected = _values(answer), _values(accepted)
    if values is None or expected is None:
        return not isinstance(_expression(accepted), sympy.Expr) and _verified(answer, accepted)
    size = max(len(values), len(expected))  # one without variables has one value at all points
    return _agree(values * (size // len(values)), expected * (size // len(expected)))


def same_equation(answer: tuple[str, str], accepted: tuple[str, str]) -> bool:
    """Whether two equations, by their sides, say the same: left minus right is a multiple of the other's."""
    first, second = (f"({left})-({right})" for left, right in (answer, accepted))
    if _expression(first) is None or _expression(second) is None or _symbols(first) != _symbols(second):
        return False
    values, expected = _values(first), _values(second)
    if values is None or expected is None or len(values) == 1:  # with one value there is no unknown
        return False
    crossed = [(_times(values[0], b), _times(expected[0], a)) for a, b in zip(values, expected, strict=True)]
    return not _is_zero(values[0]) and not _is_zero(expected[0]) and all(_agree([a], [b]) for a, b in crossed)


def real_value(text: str) -> Fraction | None:
    """The value of an expression without variables, to 50 digits; None where it has none, or is not real."""
    values = None if _expression(text) is None or _symbols(text) else _values(text)
    if values is None or not _is_zero((values[0][1], Decimal(0))) or abs(values[0][0].adjusted()) > 4_000:
        return None
    return Fraction(values[0][0])


# Values


@lru_cache(maxsize=8192)
def _values(text: str) -> list[Value] | None:
    expression, symbols = _expression(text), _symbols(text)
    values: list[Value] = []
    for point in range(POINTS if symbols else 1):
        at = {symbol: _coordinate(symbol.name, point) for symbol in symbols}
        value = _value(expression, at)
        if value is None:
            return None
        values.append(value)
    return values


def _coordinate(name: str, point: int) -> sympy.Rational:
    """Between 0.3 and 2.7, the same for a name in all expressions; from the third point on of either sign."""
    number = zlib.crc32(f"{name} {point}".encode())
    return sympy.Rational(300 + number % 2_400, 997) * (-1 if point >= 2 and number & 4_096 else 1)


def _value(expression: Any, at: dict[Any, Any]) -> Value | None:
    # Sympy raises what it likes on terms that it cannot evaluate; these have no value.
    try:
        real, imaginary = expression.evalf(DIGITS, subs=at).as_real_imag()
        value = Decimal(str(real)), Decimal(str(imaginary))
        return value if all(part.is_finite() for part in value) else None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, NotImplementedError):
        return None


def _agree(values: list[Value], expected: list[Value]) -> bool:
    return len(values) == len(expected) and all(map(_close, values, expected))


def _close(one: Value, other: Value) -> bool:
    with localcontext(prec=2 * DIGITS):
        size = max(map(abs, (*one, *other)))
        return size < NOTHING or all(abs(a - b) <= AGREE * size for a, b in zip(one, other, strict=True))


def _is_zero(value: Value) -> bool:
    return max(map(abs, value)) < NOTHING


def _times(one: Value, other: Value) -> Value:
    with localcontext(prec=2 * DIGITS):
        return one[0] * other[0] - one[1] * other[1], one[0] * other[1] + one[1] * other[0]


def _verified(answer: str, accepted: str) -> bool:
    # Whatever math-verify cannot compare has not been shown to be equal: the accepted answer equals itself.
    try:
        return verify(
            _expression(accepted),
            _expression(answer),
            timeout_seconds=None,
            raise_on_error=True,
            allow_set_relation_comp=True,
        )
    except Exception:
        return False


# Parsing

_CASES_DIFFER = ConversionConfig(lowercase_symbols=False)


@lru_cache(maxsize=8192)
def _expression(text: str) -> Any:
    if not affordable(text):
        return None
    # The parser raises bare Exceptions: what it cannot read is no expression.
    try:
        expression = latex2sympy(
            _for_parser(text), is_real=True, normalization_config=None, conversion_config=_CASES_DIFFER
        )
        return _with_symbols_alone(expression) if isinstance(expression, sympy.Basic) else expression
    except Exception:
        return None


def _with_symbols_alone(expression: Any) -> Any:
    """With a symbol for each derivative and each value of an unknown function: dx/dt, x(t). None if it is undefined."""
    if expression.has(sympy.zoo, sympy.nan):
        return None
    for kind in (sympy.Derivative, AppliedUndef):
        unknown = expression.atoms(kind)
        expression = expression.xreplace({term: sympy.Symbol(str(term), real=True) for term in unknown})
    return expression


def _symbols(text: str) -> tuple[Any, ...]:
    symbols = getattr(_expression(text), "free_symbols", ())
    return tuple(sorted(symbols, key=lambda symbol: symbol.name))


_PARSER_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"_\s*\{\s*\\text\{\s*(\w+)\s*\}\s*\}|_\s*\\text\{\s*(\w+)\s*\}", r"_{\1\2}"),
        (r"([A-Za-z])'{2,3}", r"\1_{pp}"),  # the parser reads x' as x
        (r"([A-Za-z])'", r"\1_{p}"),
        (r"([\d.]*\d)[eE]([-+]?\d{1,3})(?![\d.])", r"\1\\cdot 10^{\2}"),
        (r"(?<![_^\d.])(\d+)\s*(?=\(|\\binom)|(\))\s*(?=\(|\\binom|\d)", r"\1\2\\cdot "),  # it reads 2(3) as 2 + 3
    ]
]
# Its imaginary unit is I, it takes no index after E, and gamma for a function.
_LETTERS = {"i": "I", "I": r"\Upsilon ", "E": r"\Xi ", r"\gamma": r"\varsigma"}
_LETTER = re.compile(r"\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*\w|[iIE]")
_POINT = re.compile(r"(\d*)\.(\d+)(\s*\^)?")


def _for_parser(text: str) -> str:
    for pattern, replacement in _PARSER_REWRITES:
        text = pattern.sub(replacement, text)
    text = _LETTER.sub(lambda match: _LETTERS.get(match[0], match[0]), text)
    return _POINT.sub(_exact_decimal, text)


def _exact_decimal(match: re.Match[str]) -> str:
    fraction = rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"
    return f"({fraction})^" if match[3] else fraction


# What can be evaluated in little time

LONGEST_EXPRESSION = 300
_KNOWN = """
    frac sqrt cdot times div pi infty binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp
    lfloor rfloor lceil rceil lvert rvert vert dot ddot bar hat vec overline hbar ell alpha beta gamma delta epsilon
    varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta
    Theta Lambda Xi Pi Sigma Phi Psi Omega mho begin end cap cup setminus emptyset mathbb le ge ne in text
"""
_COMMANDS = frozenset(_KNOWN.split())
_REFUSED = re.compile(
    r"""\d{31} | \d\s+\d | !\s*! | [_^][^{}()_^]{1,3}[_^][^{}()_^]{1,3}[_^] | \\sqrt\s*\[\s*\d{3}
        | (?<![a-zA-Z\\])(?:gcd|lcm|floor|ceil|eye|zeros|ones|cols|rows|diag|norm|rank|rref|[hv]stack|svd|SVD)
        | \\begin\{(?!p?matrix|bmatrix) | (?<!_)(?<!_\{)\\text """,
    re.VERBOSE,
)
_GROWING = re.compile(r"(\^|!|\\binom)")
LARGEST = 3_000  # exponent, and number before a factorial sign
LARGEST_PRODUCT = 10**6  # of the exponents of one expression


def affordable(text: str) -> bool:
    """Whether an expression is short, shallow and small enough for it to be evaluated in well under a second.

    Towers of powers, factorials of factorials, exponents and factorials of more than 3,000, commands other than
    those of answers (sums, integrals, determinants) are not: such answers are compared as text.
    """
    return (
        0 < len(text) <= LONGEST_EXPRESSION
        and text.count("|") <= 6
        and _depth(text) <= 8
        and not _REFUSED.search(text)
        and all(command in _COMMANDS for command in re.findall(r"\\([A-Za-z]+)", text))
        and _is_small(text)
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[(){}\[\]]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest


def _is_small(text: str) -> bool:
    product = 1
    for match in _GROWING.finditer(text):
        group = _group(text, match.end())
        if match[0] == "!":
            size = _size(_before(text, match.start()))
        elif match[0] == "^":
            size = _size(group) if "^" not in group or _is_mild_tower(group) else LARGEST + 1
            product *= size
        else:
            both = group + " " + _group(text, text.find("}", match.end() + len(group)) + 1)
            size = _size(both) if "^" not in both else LARGEST + 1
        if size > LARGEST:
            return False
    return product <= LARGEST_PRODUCT


def _is_mild_tower(exponent: str) -> bool:
    """A square or the like of a variable in the exponent: e^{-x^{2}}."""
    return (
        not re.search(r"!|\\binom|\d\s*\^|[)}]\s*\^", exponent) and exponent.count("^") == 1 and _size(exponent) <= 12
    )


def _group(text: str, start: int) -> str:
    rest = text[start:].lstrip()
    return rest[1 : closing(rest, 0)] if rest.startswith("{") else rest[:1]


def _before(text: str, end: int) -> str:
    """What a factorial sign applies to."""
    text = text[:end].rstrip()
    if not text.endswith((")", "}", "]")):
        return re.search(r"\d*[^\d]?$", text)[0]  # pyright: ignore[reportOptionalSubscript]
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += {")": 1, "}": 1, "]": 1, "(": -1, "{": -1, "[": -1}.get(text[at], 0)
        if depth == 0:
            return text[at:]
    return text


def _size(group: str) -> int:
    """A bound for the value of a group in which the variables are 1: the product of its numbers, one more than each."""
    if "!" in group:
        return LARGEST + 1
    numbers = re.findall(r"\d+", re.sub(r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*\d+\s*\}", r"\1", group))
    return math.prod(max(1, int(number[:6])) + (len(numbers) > 1) for number in numbers[:8]) if numbers else 1
