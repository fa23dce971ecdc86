"""One claim: what is stated, what was measured, how near it must be, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Number = float | list[float]


@dataclass(frozen=True)
class Check:
    """One measured number (or a list, which is only shown) and its bounds."""

    name: str
    value: Number
    low: float = -math.inf
    high: float = math.inf
    bound: str = ""

    @property
    def holds(self) -> bool:
        """Whether every number is finite and strictly within the bounds."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return all(math.isfinite(value) and self.low < value < self.high for value in values)


def below(name: str, value: float, bound: float) -> Check:
    """A number that must be smaller than a bound."""
    return Check(name, float(value), high=bound, bound=f"< {bound:g}")


def above(name: str, value: float, bound: float) -> Check:
    """A number that must be greater than a bound."""
    return Check(name, float(value), low=bound, bound=f"> {bound:g}")


def near(name: str, value: float, expected: float, within: float) -> Check:
    """A number that must be an expected one."""
    return Check(name, float(value), expected - within, expected + within, f"{expected:.6g} +- {within:g}")


def shown(name: str, value: float | Sequence[float]) -> Check:
    """What is reported as it is; it must be finite."""
    return Check(name, [float(v) for v in value] if isinstance(value, Sequence) else float(value), bound="reported")


@dataclass(frozen=True)
class Claim:
    """A statement with its checks; `name` is `family/what`."""

    name: str
    statement: str
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every check does."""
        return all(check.holds for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The claim as an entry of lab.json; a number that is not finite becomes null."""
        return {
            "claim": self.name,
            "statement": self.statement,
            "measured": {check.name: _plain(check.value) for check in self.checks},
            "tolerance": {check.name: check.bound for check in self.checks},
            "holds": self.holds,
        }


def claim(name: str, statement: str, *checks: Check) -> Claim:
    """A claim from its checks, in order."""
    return Claim(name, statement, checks)


def markdown(claims: Sequence[Claim]) -> str:
    """The claims as a table in Markdown."""

    def row(*cells: str) -> str:
        return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"

    rows = [row("claim", "statement", "measured (tolerance)", "holds"), "|---|---|---|---|"]
    for each in claims:
        measured = "<br>".join(f"{check.name}: {brief(check.value)} ({check.bound})" for check in each.checks)
        rows.append(row(f"`{each.name}`", each.statement, measured, "yes" if each.holds else "**no**"))
    return "\n".join(rows) + "\n"


def brief(value: Number) -> str:
    """A number as a table shows it; of a list, the smallest and the largest."""
    return f"{min(value):.3g} .. {max(value):.3g}" if isinstance(value, list) else f"{value:.3g}"


def _plain(value: Number) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else None
