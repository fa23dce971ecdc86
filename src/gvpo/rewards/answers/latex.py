r"""Plain LaTeX: an answer without layout, fonts, dollar signs and Unicode; and splitting it where no bracket is open.

Nothing is evaluated, and nothing here is meant to change what an answer says.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

LONGEST = 1_000  # characters of an answer that is read; longer ones are compared as they stand

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u200a\u2002\u2003\t\n\r", " "),
        **dict.fromkeys("\u200b\u2060\ufeff\u2061\u2062", ""),
        **dict.fromkeys("\u2032\u2019", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
        **dict.fromkeys("\u00f7\u2215", "/"),
        **dict.fromkeys("\u2264\u2a7d", r"\le "),
        **dict.fromkeys("\u2265\u2a7e", r"\ge "),
        "\u2033": "''",
        "\u00d7": r"\times ",
        "\u00b0": r"^\circ ",
        "\u221a": r"\sqrt ",
        "\u221e": r"\infty ",
        "\u00b1": r"\pm ",
        "\u2213": r"\mp ",
        "\u2260": r"\ne ",
        "\u2208": r"\in ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2205": r"\emptyset ",
        "\u211d": r"\mathbb{R}",
        "\u2124": r"\mathbb{Z}",
        "\u03c0": r"\pi ",
        "\u03b1": r"\alpha ",
        "\u2103": r"^\circ C ",
        "\u2109": r"^\circ F ",
        "\u03b2": r"\beta ",
        "\u03b8": r"\theta ",
        "\u03bb": r"\lambda ",
        "\u03bc": r"\mu ",
        "\u03c6": r"\phi ",
        "\u03c9": r"\omega ",
    }
)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

_FONTS = r"text[a-z]{0,6}|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathcal|boldsymbol|operatorname\*?"
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|Delta|Omega"

# Of "for all x", not the next function, as in "f(x) = x for all x, or f(x) = -x for all x".
_NEXT = (
    r"(?:[,;]|\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*[A-Za-z]\([A-Za-z, ]{1,9}\)\s*="
)
_THE_REST = rf"(?:(?!{_NEXT}).)*"

_NAME = r"([A-Za-z]|\\[A-Za-z]+)\s*"
_SIGN = r"(<|>|\\[lg]e(?![a-z]))\s*"
_AND = r"\s*,?\s*(?:\\text\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![a-z]))\s*"
_BOTH = rf"^\s*{_NAME}{_SIGN}([^,<>=]{{1,80}}?){_AND}\1\s*{_SIGN}([^,<>=]{{1,80}})$"


LESS = {">": "<", r"\ge": r"\le"}
"""The signs of x > 2 and x >= 2, and those of 2 < x and 2 <= x."""


def _interval(match: re.Match[str]) -> str:
    """x > 2 and x < 3 as 2 < x < 3; as it is, where no number fulfils it and a union must be meant."""
    name, sign, bound, other_sign, other = match.groups()
    (low_sign, low), (high_sign, high) = (sign, bound), (other_sign, other)
    if sign not in LESS:
        (low_sign, low), (high_sign, high) = (high_sign, high), (low_sign, low)
    if low_sign not in LESS or high_sign in LESS or _is_less(high, low):
        return match[0]
    return f"{low} {LESS[low_sign]} {name} {high_sign} {high}"


def _is_less(one: str, other: str) -> bool:
    try:
        return float(one.strip(" .")) < float(other.strip(" ."))
    except ValueError:
        return False


def _mixed_number(match: re.Match[str]) -> str:
    """1 100/101; and not 12 500/7, whose space is between thousands."""
    whole, top, bottom = match.groups()
    return rf"{whole}\frac{{{top}}}{{{bottom}}}" if int(top) < int(bottom) else match[0]


# Equations one below the other; with an & there are conditions beside them.
_CASES = r"\\begin\{cases\}([^&]*?)\\end\{cases\}"


def _listed(match: re.Match[str]) -> str:
    return match[1].replace(r"\\", ", ")


_REPEATING = (
    r"(?<![\d.,])(\d{1,3}(?:,\d{3}){1,9}|\d{0,30})\.(\d{0,30})"
    r"\\(?:overline|bar)\s*(?:\{\s*(\d{1,30})\s*\}|(\d))(?!\d)"
)


def _repeating_decimal(match: re.Match[str]) -> str:
    start, period = match[1].replace(",", "") + match[2], match[3] or match[4]
    return rf"\frac{{{int(start + period) - int(start or 0)}}}{{{(10 ** len(period) - 1) * 10 ** len(match[2])}}}"


# In this order. Each is linear in the text's length.
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (_CASES, _listed),
        (r"\\(?:boxed|fbox)\s*(?=\{)", ""),
        (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|text|pi|left|right|cdot|times)(?![a-z]))", r"\\"),
        (r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\\$", r"\\text{dollars}"),
        ("\u20ac", r"\\text{euros}"),
        ("\u00a3", r"\\text{pounds}"),
        ("\u00a5", r"\\text{yen}"),
        (r"\$|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]", " "),
        (r"\\(?:begin|end)\{(?:aligned|align\*?|gathered|split|equation\*?)\}|&(?==)", " "),
        (
            r"\\(?:displaystyle|textstyle|limits|rm|bf|bfseries|[lL]arge|LARGE|[hH]uge|small|normalsize)(?![A-Za-z])",
            " ",
        ),
        (r"\\(?:color|textcolor|[hv]space\*?|[hv]?phantom)\s*\{[^{}]*\}|\\underline\s*(?=\{)", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?", ""),
        (r"(?<=\d)\s*,\s*\\!\s*(?=\d{3})|(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)|(?<=\d)\\,(?=\d{3}(?!\d))|(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|enspace|thinspace)(?![a-z])", " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"\\(?:lt|less)(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\leq?(?:slant|q)?(?![a-z])|<=", r"\\le "),
        (r"\\geq?(?:slant|q)?(?![a-z])|>=", r"\\ge "),
        (r"\\neq?(?![a-z])|!=", r"\\ne "),
        (r"\\(?:approx|simeq)(?![a-z])", "\u2248"),
        (r"\\varnothing(?![a-z])", r"\\emptyset "),
        (r"\\(?:degrees?|textdegree)(?![a-z])", r"^\\circ "),
        (rf"\\(?:{_FONTS})\s*\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
        (rf"\\(?:{_FONTS})\s*\{{\s*([ei])\s*\}}", r"\1"),
        (rf"\\(?:{_FONTS})\s*\{{", r"\\text{"),
        (rf"(?<=[^\s,])\s*,?\s*\\text\{{\s*,?\s*for (?:all|any|every|each)(?![a-z]){_THE_REST}", ""),
        (rf"(?<=[^\s,])\s*,?\s*(?:\\forall|(?<![A-Za-z\\])for (?:all|any|every|each))(?![a-z]){_THE_REST}", ""),
        (r"\s+", " "),
        (_BOTH, _interval),
        (r"\\text\{\s*,?\s*(?:and|or),?\s*\}|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])|\\(?:lor|vee)(?![a-z])", ","),
        (r"\\text\{\s*(?:percent|percentage|\\?%)\s*\}|\\%|(?<![A-Za-z])percent(?:age)?(?![a-z])", "%"),
        (rf"(?<![A-Za-z\\])({_FUNCTIONS}|{_GREEK}|sqrt|pi|frac)(?=[\s(^{{\\+*/,)\]}}_-]|$)", r"\\\1 "),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(^|[(\[,;<>=|{]|\\[lg]e(?![a-z]))\s*\+\s*(?=\\infty(?![a-z]))", r"\1"),
        (r"\*\*", "^"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*(\\prime)(?![a-z])", r"\1\2"),
        (r"\\prime(?![a-z])\s*", "'"),
        (r"(?<![\d.])(?<!\d )(\d{1,30}) ([1-9]\d{0,29})/(\d{1,30})(?![\d.])", _mixed_number),
        (r"(?<=\d) (?=\d{3}(?!\d))", ""),
        (r"\s+", " "),
        (_REPEATING, _repeating_decimal),
    ]
]


_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")  # nothing to rewrite: most answers


def plain_latex(text: str) -> str:
    r"""The answer in plain LaTeX: `\frac{1}{2}` for ½, \dfrac12 and \dfrac{1}{2}, no longer than some times `text`."""
    text = text.strip(" *`\n")
    if _PLAIN.fullmatch(text):
        return text
    text = re.sub("\u221a\\s*(\\d+)", r"\\sqrt{\1}", text).translate(_CHARACTERS)
    if not text.isascii():
        text = _scripts(_scripts(text, _SUPERSCRIPTS, "^"), _SUBSCRIPTS, "_")
        text = re.sub(r"[\u00bc-\u00be\u2150-\u215e]", _vulgar_fraction, text)
        text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for command, arguments, single in _ARGUMENTS:
        text = _with_braces(text, command, arguments, single)
    return trimmed(text)


def trimmed(text: str) -> str:
    """Without the marks around a sentence's end, signs of equality before the whole, and braces around it.

    Braces around several values are a set's.
    """
    text = text.strip(' ,;:"`*')
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    text = text.lstrip("=\u2248 ") or text
    while text.startswith("{") and closing(text, 0) == len(text) - 1 and len(split(text[1:-1], ",")) == 1:
        text = text[1:-1].strip()
    return text


def is_blank(text: str) -> bool:
    """Whether nothing is left of an answer without its layout."""
    return not (text if len(text) > LONGEST else plain_latex(text)).strip()


def compact(text: str) -> str:
    r"""A form in which two spellings of the same LaTeX are equal: no spaces, no `\text{}`, no needless braces."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d) +(?=\d)", "~", text).replace(" ", "")
    return re.sub(r"(?<=[_^])\{(\w)\}", r"\1", text)


def _scripts(text: str, characters: dict[str, str], mark: str) -> str:
    runs = re.compile(f"[{''.join(characters)}]+")
    return runs.sub(lambda run: f"{mark}{{{''.join(characters[character] for character in run[0])}}}", text)


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


# A command, the number of its arguments, and what one without braces may be: `\frac12`, `\sqrt13`, `x^-1`.
_ARGUMENTS = [
    (r"\frac", 2, re.compile(r"\d|\\[A-Za-z]+|[A-Za-z]")),
    (r"\sqrt", 1, re.compile(r"\d+|\\[A-Za-z]+|[A-Za-z]")),
    ("^", 1, re.compile(r"[-+]?\d+|[A-Za-z]")),
]


def _with_braces(text: str, command: str, arguments: int, single: re.Pattern[str]) -> str:
    *before, text = re.split(re.escape(command) + ("(?![a-z])" if command[0] == "\\" else ""), text)
    for part in reversed(before):  # the innermost first
        text = part + command + _first_braced(text, arguments, single)
    return text


def _first_braced(tail: str, arguments: int, single: re.Pattern[str]) -> str:
    """Braces around the arguments that the text begins with; parentheses become braces where there is one argument."""
    done = ""
    if arguments == 1 and tail.startswith("["):
        end = closing(tail, 0) + 1
        done, tail = tail[:end], tail[end:]
    for _ in range(arguments):
        tail = tail.lstrip()
        if tail.startswith("{") or (arguments == 1 and tail.startswith("(")):
            end = closing(tail, 0)
            if end < 0:
                return done + tail
            done, tail = f"{done}{{{tail[1:end]}}}", tail[end + 1 :]
        elif match := single.match(tail):
            done, tail = f"{done}{{{match[0]}}}", tail[match.end() :]
    return done + tail


# Brackets

_BRACKET = r"\\[{}]|\\begin\{[A-Za-z]*\}|\\end\{[A-Za-z]*\}|\\[A-Za-z]+|\\.|[(){}\[\]]"
_TOKEN = re.compile(_BRACKET)


def _depth_change(token: str) -> int:
    if token in ("(", "[", "{", "\\{") or token.startswith(r"\begin{"):
        return 1
    return -1 if token in (")", "]", "}", "\\}") or token.startswith(r"\end{") else 0


def closing(text: str, start: int) -> int:
    """Where the bracket that closes the one at `start` ends (of any kind: [1, 2) is an interval); -1 if nowhere."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += _depth_change(match[0])
        if depth == 0:
            return match.end() - 1
    return -1


def split(text: str, separator: str) -> list[str]:
    """The parts between the separators (a pattern) that are in no brackets."""
    return pieces(text, separator)[::2]


def pieces(text: str, separator: str) -> list[str]:
    """As `split`, with the separators: part, separator, part, and so on."""
    found: list[str] = []
    depth = start = 0
    for match in re.finditer(rf"(?P<separator>{separator})|{_BRACKET}", text):
        if match["separator"] is None:
            depth += _depth_change(match[0])
        elif depth == 0:
            found += [text[start : match.start()], match[0]]
            start = match.end()
    return [*found, text[start:]]
