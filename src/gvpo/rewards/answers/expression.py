r"""Expressions: two are equal where they have the same values. Parsed by math-verify's parser, compared to 100 digits.

math-verify compares by `simplify`, which has no bound on its time and proves little about trigonometric or nested
forms. Here both sides are evaluated at fixed, irregular points, each once (the values are kept), with 250 digits and as
many more as the largest number on the way has; they agree to 100 digits, or are different. Two answers that agree there
and are not equal would have to be made for it. What has no values, sets and relations, goes to `math_verify.verify`,
its time limits off: they are signals, and fail outside the main thread.

The evaluation gives up on numbers of more than `LARGEST_BITS` bits. This module imports sympy.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import math_verify.grader
import sympy
from math_verify import verify
from mpmath.ctx_mp import MPContext

from gvpo.rewards.answers.parsing import SET, free_symbols, parsed

P = ParamSpec("P")
T = TypeVar("T")

DIGITS = 250  # of every value, so that 100 are left after any cancellation in an answer
AGREE = "1e-100"  # difference of values that count as equal: of values below 1, relative
NOTHING = "1e-200"  # below it a value is zero: what cancellation leaves
POINTS = 4
FAR = range(POINTS, 2 * POINTS)  # points further from zero, where there are absolute values and the like
LARGEST_BITS = 20_000  # of a number, some 6,000 digits
LARGEST_ARGUMENT = 10_000  # of a factorial, an exponential or a trigonometric function
LARGEST_BETWEEN = 500  # of a factorial between whole numbers, which takes long

mp = MPContext()  # not mpmath's, whose precision others set
_lock = threading.RLock()  # it has one precision for all threads

math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # its warning that its time limit is off


def _one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return function(*args, **kwargs)

    return locked


@_one_at_a_time
def same_expression(answer: str, accepted: str) -> bool:
    """Whether two single values in plain LaTeX are equal; False where either cannot be read, or is too large to be."""
    if parsed(answer) is None or parsed(accepted) is None:
        return False
    values, expected = _values(answer), _values(accepted)
    if values is None or expected is None:
        return not isinstance(parsed(accepted), sympy.Expr) and _verified(answer, accepted)
    size = max(len(values), len(expected))  # one without variables has one value at all points
    near = all(map(_close, values * (size // len(values)), expected * (size // len(expected))))
    return near and _close_far(answer, accepted)


@_one_at_a_time
def same_equation(answer: tuple[str, str], accepted: tuple[str, str]) -> bool:
    """Whether two equations, by their sides, say the same: left minus right is a multiple of the other's."""
    first, second = (f"({left})-({right})" for left, right in (answer, accepted))
    if parsed(first) is None or parsed(second) is None or free_symbols(first) != free_symbols(second):
        return False
    values, expected = _values(first), _values(second)
    if values is None or expected is None or len(values) == 1:  # with one value there is no unknown
        return False
    with mp.workdps(DIGITS + LARGEST_BITS // 3):
        nothing = any(abs(value) < mp.mpf(NOTHING) for value in (values[0], expected[0]))
        return not nothing and all(
            _close(values[0] * b, expected[0] * a) for a, b in zip(values, expected, strict=True)
        )


@_one_at_a_time
def real_value(text: str) -> Fraction | None:
    """The value of an expression without variables, to 100 digits; None where it has none, or is not real."""
    values = None if parsed(text) is None or free_symbols(text) else _values(text)
    if values is None or not _close(values[0], mp.re(values[0])):
        return None
    sign, mantissa, exponent, _ = mp.re(values[0])._mpf_
    if abs(exponent) > 2 * LARGEST_BITS:
        return None
    return Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent


# Values


def _close_far(answer: str, accepted: str) -> bool:
    """Whether nothing differs further from zero, where both have values there."""
    if not (_has_pieces(parsed(answer)) or _has_pieces(parsed(accepted))):
        return True
    pairs = [(_value_at(answer, point), _value_at(accepted, point)) for point in FAR]
    return all(_close(one, other) for one, other in pairs if one is not None and other is not None)


def _has_pieces(expression: Any) -> bool:
    """Whether it may be two different formulas here and there: |x|, floors, the root of a square."""
    if not isinstance(expression, sympy.Basic):
        return False
    roots = (power for power in expression.atoms(sympy.Pow) if power.exp.is_Rational and not power.exp.is_Integer)
    return expression.has(sympy.Abs, sympy.floor, sympy.ceiling) or any(root.base.free_symbols for root in roots)


@lru_cache(maxsize=8192)
def _values(text: str) -> list[Any] | None:
    values: list[Any] = []
    for point in range(POINTS if free_symbols(text) else 1):
        values.append(_value_at(text, point))
        if values[-1] is None:
            return None
    return values


def _value_at(text: str, point: int) -> Any:
    try:
        return _value(parsed(text), free_symbols(text), point)
    except (_NoValue, ArithmeticError, ValueError, RecursionError, mp.NoConvergence):
        return None


def _value(expression: Any, symbols: tuple[Any, ...], point: int, digits: int = DIGITS) -> Any:
    with mp.workdps(digits):
        evaluation = _Evaluation({symbol: _coordinate(symbol.name, point) for symbol in symbols})
        value = evaluation(expression)
    needed = DIGITS + evaluation.bits // 3
    exact = evaluation.bits <= DIGITS // 3 or needed < digits
    return value if exact else _value(expression, symbols, point, needed + 9)


def _coordinate(name: str, point: int) -> Any:
    """Between 0.3 and 2.7, the same for a name in all expressions; from the third point on of either sign.

    The far ones are six times as far from zero.
    """
    number = zlib.crc32(f"{name} {point}".encode())
    return mp.mpf((300 + number % 2_400) * (6 if point in FAR else 1)) / (
        -997 if point >= 2 and number & 4_096 else 997
    )


class _NoValue(Exception):
    """A set, an unknown function, or a number that is too large."""


class _Evaluation:
    """The value of an expression at a point, and the bits of the largest number on the way to it."""

    def __init__(self, at: dict[Any, Any]) -> None:
        self.at = at
        self.bits = 0

    def __call__(self, term: Any) -> Any:
        value = self._value(term)
        if not mp.isfinite(value):
            raise _NoValue
        self.bits = max(self.bits, int(mp.mag(value))) if value else self.bits
        if self.bits > LARGEST_BITS:
            raise _NoValue
        return value

    def _value(self, term: Any) -> Any:
        if term in self.at:
            return self.at[term]
        if isinstance(term, sympy.Rational):
            return mp.mpf(term.p) / term.q
        if term in _CONSTANTS:
            return _CONSTANTS[term]()
        function = _FUNCTIONS.get(term.func)
        if function is None:
            raise _NoValue
        values = [self(argument) for argument in term.args]
        return _power(values[0], values[1], term.exp) if term.func is sympy.Pow else function(*values)


def _power(base: Any, exponent: Any, written: Any) -> Any:
    """A power; a real root where it is an odd one of a negative number."""
    if base == 0 and mp.re(exponent) < 0:
        raise _NoValue
    if base != 0 and abs(exponent) * (abs(mp.mag(base)) + 1) > LARGEST_BITS:
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


def _factorial(value: Any) -> Any:
    if abs(value) > (LARGEST_ARGUMENT if mp.isint(value) else LARGEST_BETWEEN):
        raise _NoValue
    return mp.factorial(value)


def _rounded(function: Callable[[Any], Any], sign: int) -> Callable[[Any], Any]:
    # A whole number may have come out a little too small or too large.
    return lambda value: function(mp.re(value) + sign * mp.mpf(NOTHING))


_SAME_NAME = "exp sin cos tan cot sec csc asin acos atan sinh cosh tanh"
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
    sympy.factorial: _factorial,
    sympy.floor: _rounded(mp.floor, 1),
    sympy.ceiling: _rounded(mp.ceil, -1),
    sympy.log: lambda value, base=mp.e: mp.log(value) / mp.log(base),
    sympy.UnevaluatedExpr: lambda value: value,
} | {getattr(sympy, name): _limited(getattr(mp, name)) for name in _SAME_NAME.split()}


def _close(one: Any, other: Any) -> bool:
    size = max(abs(one), abs(other))
    with mp.workdps(DIGITS + max(0, int(mp.mag(size)) // 3) if size else DIGITS):
        return size < mp.mpf(NOTHING) or abs(one - other) <= mp.mpf(AGREE) * min(1, size)


def _verified(answer: str, accepted: str) -> bool:
    if not (SET.fullmatch(answer) and SET.fullmatch(accepted)):
        return False
    # Whatever math-verify cannot compare has not been shown to be equal: the accepted answer equals itself.
    try:
        return verify(
            parsed(accepted),
            parsed(answer),
            timeout_seconds=None,
            raise_on_error=True,
            allow_set_relation_comp=True,
        )
    except Exception:
        return False
