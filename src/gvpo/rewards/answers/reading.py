r"""Reading an answer: lists, tuples, sets, intervals, matrices, equations and inequalities are taken apart.

`read` gives a tree whose leaves are single values, as plain LaTeX. Answers longer than `LONGEST` characters and parts
nested deeper than `DEEPEST` stay one leaf.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from gvpo.rewards.answers.latex import LESS, LONGEST, closing, compact, pieces, plain_latex, split, trimmed

DEEPEST = 6

Kind = Literal["leaf", "list", "set", "tuple", "interval", "matrix", "equation"]


@dataclass(frozen=True, slots=True)
class Answer:
    r"""An answer, or a part of one.

    kind: "leaf" a single value; "list" values in any order (1, 2; 1 \pm x; a union); "set" the same in braces; "tuple";
        "interval" two ends in brackets, (1, 2) included, which may be a point as well; "matrix" rows, as tuples;
        "equation" its sides.
    text: the whole part.
    brackets: of an interval, "(]" for example.
    label: what the value belongs to: `x` in x = 5, x < 5 and x \in [0, 5), `f(x)` in f(x) = 2x.
    """

    kind: Kind
    text: str
    items: tuple[Answer, ...] = ()
    brackets: str = ""
    label: str = ""


@lru_cache(maxsize=8192)
def read(text: str) -> Answer:
    """The tree of an answer as it was written."""
    plain = plain_latex(text) if len(text) <= LONGEST else text
    return _read(plain, 0) if len(plain) <= LONGEST else Answer("leaf", "".join(text.split()))


def read_as_list(text: str) -> Answer:
    """The tree where every comma separates: 100,200 is two numbers and not one."""
    return read(text.replace(",", ", "))


_SYMBOL = r"(?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\{[^{}]*\}|\w))?'*"
_LABEL = re.compile(
    rf"{_SYMBOL}(?:\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})*\s*\))?|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})+\s*\)|\\text\{{[^{{}}]*\}}"
)
_THOUSANDS = re.compile(r"(?:[^,;\d]|(?<!\d)(?:\d{1,3}(?:,\d{3})+|\d+)(?![\d,]))+")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?")
_TRANSPOSED = re.compile(r"\^\s*(?:T|\{\s*T\s*\}|\\top|\{\s*\\top\s*\})$")


def _read(text: str, depth: int) -> Answer:
    text = trimmed(text)
    if match := re.fullmatch(r"\\text\{([^{}]*,[^{}]*)\}", text):
        text = match[1]
    if depth < DEEPEST:
        for reader in _READERS:
            if answer := reader(text, depth + 1):
                return answer
    return Answer("leaf", text)


def _items(parts: list[str], depth: int) -> tuple[Answer, ...]:
    r"""The parts, with the values of 1 \pm x next to each other in place of one part."""
    read_parts = [_read(part, depth) for part in parts if part.strip()]
    return tuple(item for part in read_parts for item in (part.items if part.kind == "list" else (part,)))


def _approximation(text: str, depth: int) -> Answer | None:
    """What is exact of `exact ≈ rounded`."""
    parts = split(text, "\u2248")
    if len(parts) == 1:
        return None
    name = parts[0].strip()
    named = _LABEL.fullmatch(name) and name not in (r"\pi", "e")
    return _read("=".join(parts) if named else name, depth)


def _list(text: str, depth: int) -> Answer | None:
    parts = _between_commas(text)
    if len(parts) > 1:
        return Answer("list", text, _items(parts, depth))
    return _read(text.replace(",", ""), depth) if _has_thousands(text) else None


def _between_commas(text: str) -> list[str]:
    """1,234 is a number, 1,2 a list; with a space after some comma, that is the one that separates: 1,234, 5,678."""
    if _has_thousands(text):
        return [text]
    spaced = split(text, r",\s|;")
    if len(spaced) == 1:
        return split(text, ",")
    return [part for piece in spaced for part in _between_commas(piece)]


def _has_thousands(text: str) -> bool:
    """Whether each of its commas, none of them in brackets, is inside one number."""
    return "," in text and _THOUSANDS.fullmatch(text) is not None and len(split(text, ",")) == text.count(",") + 1


def _union(text: str, depth: int) -> Answer | None:
    parts = split(text, r"\\cup(?![a-z])")
    if len(parts) == 1:
        return None
    read_parts = _items(parts, depth)
    return Answer(
        "list", text, tuple(x for part in read_parts for x in (part.items if part.kind == "set" else (part,)))
    )


def _member(text: str, depth: int) -> Answer | None:
    parts = split(text, r"\\in(?![a-z])")
    if len(parts) != 2 or not _LABEL.fullmatch(parts[0].strip()):
        return None
    return replace(_read(parts[1], depth), text=text, label=compact(parts[0]))


def _equation(text: str, depth: int) -> Answer | None:
    sides = [side.strip() for side in split(text, "=")]
    if len(sides) == 1 or not all(sides):
        return None
    if _LABEL.fullmatch(sides[-1]) and not _LABEL.fullmatch(sides[0]):
        sides.reverse()
    label = compact(sides[0]) if _LABEL.fullmatch(sides[0]) else ""
    return Answer("equation", text, tuple(_read(side, depth) for side in sides), label=label)


def _inequality(text: str, depth: int) -> Answer | None:
    found = [piece.strip() for piece in pieces(text, r"<|>|\\[lg]e(?![a-z])")]
    sides, signs = found[::2], found[1::2]
    if all(sign in LESS for sign in signs):
        sides, signs = sides[::-1], [LESS[sign] for sign in signs[::-1]]
    if len(sides) == 2 and _LABEL.fullmatch(sides[0]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    elif len(sides) == 2:
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if len(sides) != 3 or not _LABEL.fullmatch(sides[1]) or any(sign in LESS for sign in signs):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Answer("interval", text, (_read(sides[0], depth), _read(sides[2], depth)), brackets, compact(sides[1]))


def _set(text: str, depth: int) -> Answer | None:
    if not (text.startswith((r"\{", "{")) and _spans(text)):
        return None
    inner = text[2:-2] if text.startswith("\\") else text[1:-1]
    described = split(inner, r"\\mid(?![a-z])|[|:]")
    if len(described) == 2:
        # Of x | x > 2 the condition alone; 3n | n in Z is a family.
        label, condition = compact(split(described[0], r"\\in(?![a-z])")[0]), compact(described[1])
        if _LABEL.fullmatch(label) and all(name in condition for name in label.strip("()").split(",")):
            return _read(described[1], depth)
        return Answer("leaf", rf"\{{{described[0].strip()}|{described[1].strip()}\}}")
    items = _items(_between_commas(f"{inner},"), depth)
    return Answer("set", text, items) if items else Answer("leaf", r"\emptyset")


def _spans(text: str) -> bool:
    return closing(text, 0) == len(text) - 1


def _plus_minus(text: str, depth: int) -> Answer | None:
    parts = re.split(r"\\(pm|mp)(?![a-z])", text)
    signs = parts[1::2]
    if not 1 <= len(signs) <= 3 or len(parts[0]) + len(parts[-1]) > 300:
        return None
    linked = "mp" in signs
    choices = ["+-", "-+"] if linked else list(product("+-", repeat=len(signs)))
    texts = []
    for choice in choices:
        chosen = [choice[0 if sign == "pm" else 1] for sign in signs] if linked else choice
        texts.append(parts[0] + "".join(sign + part for sign, part in zip(chosen, parts[2::2], strict=True)))
    return Answer("list", text, _items(texts, depth))


def _bracketed(text: str, depth: int) -> Answer | None:
    text = _TRANSPOSED.sub("", text) if text.startswith(("(", "[")) else text
    if not (text.startswith(("(", "[")) and text.endswith((")", "]")) and _spans(text)):
        return None
    parts = [part for part in _between_commas(f"{text[1:-1]},") if part.strip()]
    brackets = text[0] + text[-1]
    if len(parts) == 1 and brackets in ("()", "[]") and not re.fullmatch(r"\([A-Za-z]\)", text):
        return _read(parts[0], depth)
    if len(parts) < 2:
        return None
    items = tuple(_read(part, depth) for part in parts)
    return Answer("interval", text, items, brackets) if len(items) == 2 else Answer("tuple", text, items)


def _matrix(text: str, depth: int) -> Answer | None:
    text = _TRANSPOSED.sub("", text) if "&" not in text and text.startswith(r"\begin") else text
    match = _MATRIX.match(text)
    if not match or not _spans(text) or r"\end{" not in text:
        return None
    body = text[match.end() : text.rindex(r"\end")]
    rows = [row for row in split(body, r"\\\\") if row.strip()]
    cells = [tuple(_read(cell, depth) for cell in split(row, "&")) for row in rows]
    if len(cells) == 1 or all(len(row) == 1 for row in cells):  # a vector
        return Answer("tuple", text, tuple(cell for row in cells for cell in row))
    return Answer("matrix", text, tuple(Answer("tuple", row, items) for row, items in zip(rows, cells, strict=True)))


_READERS = (_approximation, _list, _union, _member, _equation, _inequality, _set, _plus_minus, _bracketed, _matrix)
