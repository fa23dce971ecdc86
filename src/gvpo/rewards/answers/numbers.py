r"""Single values as text: plain numbers, exactly; units, percent signs and words of size; choices; other bases."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from gvpo.rewards.answers.latex import LONGEST

MOST_DIGITS = 4_000  # of a number that is compared as a number; Python refuses to read more than 4,300 at once
RELATIVE = Fraction(1, 10_000)
_TOO_LARGE = 10**MOST_DIGITS


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written; `unit` is one unit in its last place where it is a decimal, else None: it is exact."""

    value: Fraction
    unit: Fraction | None = None


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value without its units (`core`), their names, and whether it was followed by a percent sign."""

    core: str
    units: frozenset[str] = frozenset()
    percent: bool = False


# Numbers

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_POWER = r"10\^(?:\{\s*([-+]?\s*\d{1,5})\s*\}|([-+]?\d{1,5}))"
_SCIENTIFIC = re.compile(rf"([-+]?{_DECIMAL})\s*(?:[eE]([-+]?\d{{1,5}})|(?:\\times|\\cdot|\*|x)\s*{_POWER})")
_PLAIN = re.compile(rf"[-+]?\s*{_DECIMAL}")
_ONLY_POWER = re.compile(rf"([-+]?)\s*{_POWER}")
_SIGNED = rf"[-+]?\s*{_DECIMAL}"
_RATIO = re.compile(
    rf"([-+]?)\s*(?:(\d+)\s*)?\\frac\{{\s*({_SIGNED})\s*\}}\{{\s*({_SIGNED})\s*\}}"
    rf"|([-+]?)\s*(?:(\d+)\s+)?({_DECIMAL})\s*/\s*({_SIGNED})"
)


@lru_cache(maxsize=8192)
def plain_number(text: str) -> Number | None:
    r"""The number that is written as 1.5, -2e7, 3 \times 10^{8}, \frac{1}{2}, 1/2, 1 1/2 or the like; else None."""
    if len(text) > MOST_DIGITS:
        return None
    text = text.strip().removeprefix("(").removesuffix(")").strip() if text.startswith("(") else text.strip()
    if _PLAIN.fullmatch(text):
        return Number(_fraction(text), _last_place(text) if "." in text else None)
    if match := _SCIENTIFIC.fullmatch(text):
        power = _power(match[2] or match[3] or match[4])
        return Number(_fraction(match[1]) * power, _last_place(match[1]) * power) if power else None
    if match := _ONLY_POWER.fullmatch(text):
        power = _power(match[2] or match[3])
        return Number(-power if match[1] == "-" else power) if power else None
    return _ratio(match) if (match := _RATIO.fullmatch(text)) else None


def in_lowest_terms(text: str) -> bool:
    """Whether it is a plain number, and no fraction that can be reduced: 0.5, 3 or 1/2; not 2/4 or 6/1."""
    if plain_number(text) is None:
        return False
    if (match := _RATIO.fullmatch(text.strip())) is None:
        return True
    top, bottom = map(_fraction, _parts(match)[2:])
    whole = top.denominator == bottom.denominator == 1 < abs(bottom)
    return whole and math.gcd(top.numerator, bottom.numerator) == 1


def same_number(answer: Fraction, accepted: Number) -> bool:
    """Whether they are equal; where the accepted one is a decimal, whether the answer, rounded, is it.

    Rounded in its last place, and never further than one part in 10,000 away, whichever is less.
    """
    if accepted.unit is None or answer == accepted.value:
        return answer == accepted.value
    return abs(answer - accepted.value) <= min(accepted.unit / 2, RELATIVE * abs(accepted.value))


def _fraction(text: str) -> Fraction:
    text = "".join(text.split())
    return Fraction(text if text[-1] != "." else text[:-1])


def _last_place(text: str) -> Fraction:
    return Fraction(1, 10 ** len(text.partition(".")[2]))


def _power(exponent: str) -> Fraction | None:
    """That power of ten; None where it has more than MOST_DIGITS digits."""
    number = int("".join(exponent.split()))
    return Fraction(10) ** number if abs(number) < MOST_DIGITS else None


def _parts(match: re.Match[str]) -> tuple[Any, ...]:
    """Sign, whole number, numerator and denominator of a `_RATIO`, whichever way it is written."""
    return match.groups()[:4] if match[4] else match.groups()[4:]


def _ratio(match: re.Match[str]) -> Number | None:
    sign, whole, top, bottom = _parts(match)
    numerator, denominator = _fraction(top), _fraction(bottom)
    if denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = numerator / denominator + int(whole or 0)
    return Number(-value if sign == "-" else value)


# Units

_UNIT_NAMES = """
    mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; in inch inches; yd yard;
    ft foot feet; mi mile; nm; \u00b5m um; AU; pc; kpc; Angstrom angstrom angstroms; mg milligram; g gram; kg kilogram;
    lb pound; oz ounce; ton tonne; ms; s sec second; min minute; h hr hour; day; week; month; yr year; mol mole; unit;
    L l liter litre; mL ml milliliter millilitre; gallon gal; dollar usd; cent; degree deg; radian rad; celsius; mph;
    fahrenheit; K kelvin; Hz hertz; kHz; MHz; GHz; J joule; kJ; W watt; kW; N newton; V volt; eV; keV; MeV; Pa; kPa;
    MPa; GPa; euro; yen; atm; erg; dyne; cal; kcal; kmh kph; person people
"""
_UNITS = {name: line.split()[0] for line in _UNIT_NAMES.split(";") for name in line.split()}
_SIZES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_OTHER_NUMBERS = """
    squared cubed factorial plus minus times over divided mod modulo choose base not when are than half halves third
    thirds fourth fourths quarter quarters fifth fifths sixth sixths eighth eighths tenth tenths
"""  # words after a number that make another number of it, or a doubt
_NO_UNITS = frozenset(_OTHER_NUMBERS.split())
_MORE_THAN_UNITS = re.compile(rf"\\text\{{([^{{}}]*\b(?:{'|'.join([*_SIZES, *_OTHER_NUMBERS.split()])})\b[^{{}}]*)\}}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_CURRENCY = re.compile(r"(-?\s*)\\text\{(dollar|euro|pound|yen)s?\}")
_END_MARK = re.compile(
    r"(?P<text>\\text\{[^{}]*\})(?:\s*\^\s*(?:\{[^{}]*\}|[-+]?\d))?$"
    r"|(?P<degree>\^\s*\\circ\s*(?:[CF]|\\text\{\s*[CF]\s*\})?)$|(?P<prime>(?<=\d)\s*\^?'{1,2})$|(?P<percent>%)$"
)
_WORDS = re.compile(r"(?P<core>.*?[\d})])(?P<gap>\s*)(?P<words>[A-Za-z\u00b5](?:[A-Za-z\u00b5 /{}.-]|\^\{?-?\d)*+)$")


@lru_cache(maxsize=8192)
def quantity(text: str, *, of_answer: bool) -> Quantity:
    """The value and its units.

    of_answer: a single letter after a space counts as a unit (5 m); in an accepted answer it is a variable.
    """
    if len(text) > LONGEST:
        return Quantity(text)
    units: set[str] = set()
    percent = False
    text = _MORE_THAN_UNITS.sub(r" \1", text).strip()
    if match := _CURRENCY.match(text):
        text = (match[1] + text[match.end() :]).strip()
        units |= _known(match[2])
    for _ in range(6):
        match = _END_MARK.search(text)
        core = text[: match.start()].rstrip(" /\\,") if match else ""
        if match is None or not core or (match["degree"] and _TRIGONOMETRIC.search(core)):
            break
        if match["prime"] and plain_number(core) is None:  # of x_1', no minutes
            break
        units |= _degrees(match["degree"]) if match["degree"] else _known(match["text"] or "")
        percent = percent or match["percent"] is not None
        text = core
    if (match := _WORDS.fullmatch(text)) and (number := plain_number(match["core"])):
        words = re.findall("[A-Za-z\u00b5]+", match["words"])
        if all(_is_unit(word, match["gap"] != "", of_answer) for word in words):
            sizes = [_SIZES[word] for word in words if word in _SIZES]
            value = number.value * math.prod(sizes)
            if not sizes or max(abs(value.numerator), value.denominator) < _TOO_LARGE:
                core = str(value) if sizes else match["core"]
                return Quantity(core, frozenset(units | _known(match["words"])), percent)
    return Quantity(text, frozenset(units), percent)


def units_differ(first: Quantity, second: Quantity) -> bool:
    """Whether both have units that are known, and neither has all of the other's. Nothing is converted."""
    return not (first.units <= second.units or second.units <= first.units)


def _degrees(mark: str) -> set[str]:
    scale = next((name for letter, name in (("C", "celsius"), ("F", "fahrenheit")) if letter in mark), None)
    return {"degree", scale} if scale else {"degree"}


def _known(words: str) -> set[str]:
    found = re.findall("[A-Za-z\u00b5]+", words.removeprefix(r"\text"))
    spellings = [
        (word, word.removesuffix("s"), *([word.lower(), word.lower().removesuffix("s")] if len(word) > 2 else []))
        for word in found
    ]
    names = [next((one for one in spelling if one in _UNITS), None) for spelling in spellings]
    return {_UNITS[name] for name in names if name}


def _is_unit(word: str, apart: bool, of_answer: bool) -> bool:
    """apart: from the number, by a space; else letters are a product, 2mgh, but for the units that are known."""
    if len(word) == 1:
        return of_answer and apart and word in _UNITS
    if word in _SIZES or (_known(word) and (apart or len(word) > 2 or (word in _UNITS and word != "mg"))):
        return True
    return apart and len(word) > 2 and word.lower() not in _NO_UNITS


# Choices and other bases

_CHOICE = re.compile(r"(?:\\text\{\s*)?\(?\s*([A-Z])\s*[).:]{0,2}\s*\}?")
_LABELLED = re.compile(r"(?:\\text\{\s*\(?[A-J][).:]{0,2}\s*\}|\([A-J]\)|[A-J][).:])\s*(?=[^\s^_+*/=<>-])")
_BASE = re.compile(r"([0-9A-Z]{1,200})_(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))")


def choice(text: str) -> str | None:
    r"""The letter of a multiple choice: C in C, (C), C., \text{(C)}; None for anything else."""
    match = _CHOICE.fullmatch(text)
    return match[1] if match else None


def without_label(text: str) -> tuple[str | None, str]:
    """The letter and the rest of `(C) 42`."""
    match = _LABELLED.match(text)
    return (choice(match[0].strip()), text[match.end() :].strip()) if match else (None, text)


def in_base(text: str) -> tuple[str, int] | None:
    """The digits and the base of 2516_8; None for a letter with an index, T_0, that can be no number."""
    match = _BASE.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    found = (match[1].lstrip("0") or "0", int(match[2] or match[3]))
    return found if match[1][0].isdigit() or base_value(*found) is not None else None


def base_value(digits: str, base: int) -> Fraction | None:
    """The number that is meant; None where the base is none, or a digit is no digit of it."""
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return Fraction(int(digits, base))
