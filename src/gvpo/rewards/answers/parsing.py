r"""Parsing an expression with math-verify's parser, left unevaluated, where that takes little time.

`affordable` looks at the text alone. What it refuses, and what the parser does not read, is no expression; such answers
are compared as text. This module imports sympy.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.function import AppliedUndef

from gvpo.rewards.answers.latex import closing

_CASES_DIFFER = ConversionConfig(lowercase_symbols=False)


@lru_cache(maxsize=8192)
def parsed(text: str) -> Any:
    """The expression, set or relation, or None; derivatives and values of unknown functions are symbols in it."""
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


def free_symbols(text: str) -> tuple[Any, ...]:
    """The variables of an expression, by name."""
    symbols = getattr(parsed(text), "free_symbols", ())
    return tuple(sorted(symbols, key=lambda symbol: symbol.name))


_PARSER_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"_\s*\{\s*\\text\{\s*(\w+)\s*\}\s*\}|_\s*\\text\{\s*(\w+)\s*\}", r"_{\1\2}"),
        (r"_\s*\{?\s*\\odot\s*\}?", r"_{sun}"),
        (r"\^\s*\{\s*T\s*\}", "^{(T)}"),  # it reads a transpose, and drops what it cannot transpose
        (r"(\d+|[A-Za-z])\s*!(?=\s*\^)", r"(\1!)"),
        (r"([\d.]*\d)[eE]([-+]?\d{1,3})(?![\d.])", r"\1\\cdot 10^{\2}"),
        (r"(?<![_^\d.])(\d+)\s*(?=\(|\\binom)|(\))\s*(?=\(|\\binom|\d)", r"\1\2\\cdot "),  # it reads 2(3) as 2 + 3
    ]
]
# It reads x' as x.
_PRIMED = re.compile(r"(\\[A-Za-z]+|[A-Za-z])\s*('*)\s*(?:_\s*(?:\{([^{}]*)\}|(\w)))?\s*('*)")
# Its imaginary unit is I, which is I in all powers unless it is in braces; it takes no index after E, and gamma for a
# function.
_LETTERS = {"i": "I", "I": r"\Upsilon ", "E": r"\Xi ", r"\gamma": r"\varsigma"}
_LETTER = re.compile(r"\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*\w|(?P<indexed>i)(?=\s*_)|(?P<power>i)(?=\s*\^)|[iIE]")
_POINT = re.compile(r"(\d*)\.(\d+)(\s*\^)?")


def _for_parser(text: str) -> str:
    for pattern, replacement in _PARSER_REWRITES:
        text = pattern.sub(replacement, text)
    text = _PRIMED.sub(_primed, text)
    if "'" in text:
        raise ValueError(text)
    while (start := text.find(r"\binom{")) >= 0:  # the parser evaluates it at once
        end = closing(text, start + 6)
        last = closing(text, end + 1)
        if not 0 < end < last:
            raise ValueError(text)
        top, bottom = text[start + 7 : end], text[end + 2 : last]
        text = rf"{text[:start]}\frac{{({top})!}}{{({bottom})!(({top})-({bottom}))!}}{text[last + 1 :]}"
    text = _LETTER.sub(_letter, text)
    return _POINT.sub(_exact_decimal, text)


def _primed(match: re.Match[str]) -> str:
    primes = len(match[2] + match[5])
    return f"{match[1]}_{{{match[3] or match[4] or ''}{'p' * primes}}}" if primes else match[0]


def _letter(match: re.Match[str]) -> str:
    if match["indexed"]:
        return r"\iota "
    return "{I}" if match["power"] else _LETTERS.get(match[0], match[0])


def _exact_decimal(match: re.Match[str]) -> str:
    fraction = rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"
    return f"({fraction})^" if match[3] else fraction


# What can be evaluated in little time

LONGEST_EXPRESSION = 350
DEEPEST_EXPRESSION = 8
_KNOWN = """
    frac sqrt cdot times div pi infty binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp
    lfloor rfloor lceil rceil lvert rvert vert dot ddot bar hat vec overline hbar ell alpha beta gamma delta epsilon
    varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Delta
    Theta Lambda Xi Pi Sigma Phi Psi Omega mho begin end cap cup setminus emptyset mathbb le ge ne text odot angle
"""
_COMMANDS = frozenset(_KNOWN.split())
_REFUSED = re.compile(
    r"""\.\d{31} | \d\s+\d | !\s*! | [_^][^{}()_^]{1,3}[_^][^{}()_^]{1,3}[_^] | \\sqrt\s*\[(?!\s*(?:\d\d?|[a-z])\s*\])
        | (?<![a-zA-Z\\])(?:gcd|lcm|floor|ceil|eye|zeros|ones|cols|rows|diag|norm|rank|rref|[hv]stack|svd|SVD)
        | \\begin\{(?!p?matrix|bmatrix) | (?<!_)(?<!_\{)\\text """,
    re.VERBOSE,
)


# Sets and relations of plain numbers: the parser compares the ends of intervals, and math-verify solves.
SET = re.compile(
    r"""(?: [-+\d\s.,;()\[\]{}<>=/] | (?<![A-Za-z])[A-Za-z](?![A-Za-z]) | \\[{}]
          | \\(?:cup|cap|setminus|emptyset|mathbb\{[NZQRC]\}|infty|frac|sqrt|pi|ne|le|ge)(?![A-Za-z]) ){1,100}""",
    re.VERBOSE,
)
_NEEDS_SET = re.compile(r"[,;<>]|\\(?:cup|cap|setminus|emptyset|mathbb|ne|le|ge|in)(?![A-Za-z])|\\[{}]")


def affordable(text: str) -> bool:
    """Whether the parser reads an expression in well under a second, and leaves it unevaluated.

    What is longer or deeper, has commands other than those of answers (sums, integrals, determinants) or more than
    30 decimals is compared as text.
    """
    return (
        0 < len(text) <= LONGEST_EXPRESSION
        and text.count("|") <= 6
        and text.count("binom") <= 2
        and _depth(text) <= DEEPEST_EXPRESSION
        and not _REFUSED.search(text)
        and (not _NEEDS_SET.search(text) or SET.fullmatch(text) is not None)
        and all(command in _COMMANDS for command in re.findall(r"\\([A-Za-z]+)", text))
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[(){}\[\]]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest
