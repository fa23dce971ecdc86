r"""Expressions: two are equal where they have the same values. Parsed by math-verify's parser, compared to 40 digits.

math-verify compares by `simplify`, which has no bound on its time and proves little about trigonometric or nested
forms. Here both sides are evaluated with 150 digits at fixed, irregular points, each once (the values are kept), and
agree to 40 digits or are different. Two answers that agree there and are not equal would have to be made for it. What
has no values, sets and relations, goes to `math_verify.verify`, its time limits off: they are signals, and fail outside
the main thread.

Nothing is handed to the parser that could take it long: `affordable` looks at the text alone. The parser leaves terms
unevaluated, and the evaluation gives up on numbers of more than `LARGEST_POWER` bits. This module imports sympy.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import math_verify.grader
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from mpmath import mp
from sympy.core.function import AppliedUndef

from gvpo.rewards.answer_latex import closing

DIGITS = 150  # of every value, so that 40 are left after any cancellation in an answer
AGREE = "1e-40"  # relative difference of values that count as equal
NOTHING = "1e-90"  # below it a value is zero: what cancellation leaves
POINTS = 4
LARGEST_POWER = 10**6  # bits of a power
LARGEST_ARGUMENT = 10**5  # of a factorial or an exponential function

math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # its warning that its time limit is off


def same_expression(answer: str, accepted: str) -> bool:
    """Whether two single values in plain LaTeX are equal; False where either cannot be read, or is too large to be."""
    if _expression(answer) is None or _expression(accepted) is None:
        return False
    values, expected = _values(answer), _values(accepted)
    if values is None or expected is None:
        return not isinstance(_expression(accepted), sympy.Expr) and _verified(answer, accepted)
    size = max(len(values), len(expected))  # one without variables has one value at all points
    return all(map(_close, values * (size // len(values)), expected * (size // len(expected))))


def same_equation(answer: tuple[str, str], accepted: tuple[str, str]) -> bool:
    """Whether two equations, by their sides, say the same: left minus right is a multiple of the other's."""
    first, second = (f"({left})-({right})" for left, right in (answer, accepted))
    if _expression(first) is None or _expression(second) is None or _symbols(first) != _symbols(second):
        return False
    values, expected = _values(first), _values(second)
    if values is None or expected is None or len(values) == 1:  # with one value there is no unknown
        return False
    with mp.workdps(DIGITS):
        nothing = any(abs(value) < mp.mpf(NOTHING) for value in (values[0], expected[0]))
        return not nothing and all(
            _close(values[0] * b, expected[0] * a) for a, b in zip(values, expected, strict=True)
        )


def real_value(text: str) -> Fraction | None:
    """The value of an expression without variables, to 40 digits; None where it has none, or is not real."""
    values = None if _expression(text) is None or _symbols(text) else _values(text)
    if values is None or not _close(values[0], mp.re(values[0])):
        return None
    sign, mantissa, exponent, _ = mp.re(values[0])._mpf_
    return Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent if abs(exponent) < 20_000 else None


# Values


@lru_cache(maxsize=8192)
def _values(text: str) -> list[Any] | None:
    symbols = _symbols(text)
    with mp.workdps(DIGITS):
        at_points = [
            {one: _coordinate(one.name, point) for one in symbols} for point in range(POINTS if symbols else 1)
        ]
        try:
            return [_evaluated(_expression(text), at) for at in at_points]
        except (_NoValue, ArithmeticError, ValueError, RecursionError, mp.NoConvergence):
            return None


def _coordinate(name: str, point: int) -> Any:
    """Between 0.3 and 2.7, the same for a name in all expressions; from the third point on of either sign."""
    number = zlib.crc32(f"{name} {point}".encode())
    return mp.mpf(300 + number % 2_400) / (-997 if point >= 2 and number & 4_096 else 997)


class _NoValue(Exception):
    """A set, an unknown function, or a number that is too large."""


def _evaluated(term: Any, at: dict[Any, Any]) -> Any:
    if term in at:
        return at[term]
    if isinstance(term, sympy.Rational):
        return mp.mpf(term.p) / term.q
    if term in _CONSTANTS:
        return _CONSTANTS[term]()
    function = _FUNCTIONS.get(term.func)
    if function is None:
        raise _NoValue
    values = [_evaluated(argument, at) for argument in term.args]
    value = _power(values[0], values[1], term.exp) if term.func is sympy.Pow else function(*values)
    if not mp.isfinite(value):
        raise _NoValue
    return value


def _power(base: Any, exponent: Any, written: Any) -> Any:
    """A power; a real root where it is an odd one of a negative number."""
    if base == 0 and mp.re(exponent) < 0:
        raise _NoValue
    if base != 0 and abs(exponent) * (abs(mp.mag(base)) + 1) > LARGEST_POWER:
        raise _NoValue
    odd_root = isinstance(written, sympy.Rational) and written.q % 2 == 1
    if odd_root and mp.im(base) == 0 and mp.re(base) < 0:
        return mp.power(-base, exponent) * (-1) ** (written.p % 2)
    return mp.power(base, exponent)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    def applied(*values: Any) -> Any:
        if any(abs(value) > LARGEST_ARGUMENT for value in values):
            raise _NoValue
        return function(*values)

    return applied


def _rounded(function: Callable[[Any], Any], sign: int) -> Callable[[Any], Any]:
    # A whole number may have come out a little too small or too large.
    return lambda value: function(mp.re(value) + sign * mp.mpf(NOTHING))


_CONSTANTS: dict[Any, Callable[[], Any]] = {
    sympy.pi: lambda: +mp.pi,
    sympy.E: lambda: +mp.e,
    sympy.I: lambda: mp.mpc(0, 1),
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: lambda *values: mp.fsum(values),
    sympy.Mul: lambda *values: mp.fprod(values),
    sympy.Pow: mp.power,
    sympy.Abs: abs,
    sympy.floor: _rounded(mp.floor, 1),
    sympy.ceiling: _rounded(mp.ceil, -1),
    sympy.log: lambda value, base=mp.e: mp.log(value) / mp.log(base),
    sympy.UnevaluatedExpr: lambda value: value,
} | {
    getattr(sympy, name): _limited(getattr(mp, name))
    for name in "exp factorial sin cos tan cot sec csc asin acos atan sinh cosh tanh".split()  # noqa: SIM905
}


def _close(one: Any, other: Any) -> bool:
    with mp.workdps(DIGITS):
        size = max(abs(one), abs(other))
        return size < mp.mpf(NOTHING) or abs(one - other) <= mp.mpf(AGREE) * size


def _verified(answer: str, accepted: str) -> bool:
    if not {"^", "!"}.isdisjoint(answer + accepted):  # it would evaluate them, whatever their size
        return False
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
    while (start := text.find(r"\binom{")) >= 0:  # the parser evaluates it at once
        end = closing(text, start + 6)
        last = closing(text, end + 1)
        if not 0 < end < last:
            raise ValueError(text)
        top, bottom = text[start + 7 : end], text[end + 2 : last]
        text = rf"{text[:start]}\frac{{({top})!}}{{({bottom})!(({top})-({bottom}))!}}{text[last + 1 :]}"
    text = _LETTER.sub(lambda match: _LETTERS.get(match[0], match[0]), text)
    return _POINT.sub(_exact_decimal, text)


def _exact_decimal(match: re.Match[str]) -> str:
    fraction = rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"
    return f"({fraction})^" if match[3] else fraction


# What can be evaluated in little time

LONGEST_EXPRESSION = 300
DEEPEST_EXPRESSION = 8
_KNOWN = """
    frac sqrt cdot times div pi infty binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp
    lfloor rfloor lceil rceil lvert rvert vert dot ddot bar hat vec overline hbar ell alpha beta gamma delta epsilon
    varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Delta
    Theta Lambda Xi Pi Sigma Phi Psi Omega mho begin end cap cup setminus emptyset mathbb le ge ne in text
"""
_COMMANDS = frozenset(_KNOWN.split())
_REFUSED = re.compile(
    r"""\d{31} | \d\s+\d | !\s*! | [_^][^{}()_^]{1,3}[_^][^{}()_^]{1,3}[_^] | \\sqrt\s*\[\s*\d{3}
        | (?<![a-zA-Z\\])(?:gcd|lcm|floor|ceil|eye|zeros|ones|cols|rows|diag|norm|rank|rref|[hv]stack|svd|SVD)
        | \\begin\{(?!p?matrix|bmatrix) | (?<!_)(?<!_\{)\\text """,
    re.VERBOSE,
)


def affordable(text: str) -> bool:
    """Whether the parser reads an expression in well under a second, and leaves it unevaluated.

    What is longer or deeper, has commands other than those of answers (sums, integrals, determinants) or numbers of
    more than 30 digits is compared as text.
    """
    return (
        0 < len(text) <= LONGEST_EXPRESSION
        and text.count("|") <= 6
        and text.count("binom") <= 2
        and _depth(text) <= DEEPEST_EXPRESSION
        and not _REFUSED.search(text)
        and all(command in _COMMANDS for command in re.findall(r"\\([A-Za-z]+)", text))
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[(){}\[\]]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest
