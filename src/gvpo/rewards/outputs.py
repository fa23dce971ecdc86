"""What a reward function gives back, read as plain data: its values, and what it logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any

from gvpo.errors import UserError, error_line, shortened


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a member got no verdict. cause: one of `CAUSES`; detail: the rest of the line."""

    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


CAUSES = ("hang", "crash", "exit", "memory", "output", "garbled")
"""No answer in time; a signal ended the process; it exited; too much memory; too much printed; no answer but bytes."""


@dataclass(slots=True)
class Output:
    """What one call gave its members.

    values: for each member a number, finite or not; None for no opinion; as a string, how what is no number is shown.
    metrics: numbers by name; extra: columns of one value per member. failures: by member, whose value is then None.
    """

    values: list[float | str | None]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)


class Log:
    """What one function logs during its call; the methods' parameters are named as in TRL."""

    def __init__(self, function_name: str) -> None:
        self.function_name = function_name
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def log_extra(self, column: str, values: list[Any]) -> None:
        # Arrays and tensors, as lists and numbers: a completions file is JSON.
        self.extra[column].extend(value.tolist() if hasattr(value, "tolist") else value for value in values)

    def log_metric(self, name: str, value: float) -> None:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise UserError(
                f"reward function {self.function_name!r} called log_metric({name!r}, ...) with {_shown(value)}: "
                "give a finite number"
            )
        self.metrics[name].append(number)


@contextmanager
def blaming(name: str, *, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What a reward function raises inside the block, but for `passing`, is its user's to fix: a UserError names it."""
    try:
        yield
    except (UserError, *passing):  # the function says itself what its user has to fix
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name!r} raised {error_line(error)}: fix it, or return None there") from error


def read_output(name: str, returned: Any, log: Log, count: int) -> Output:
    """What a function returned and logged for `count` members.

    Raises UserError for anything but a list (tuple, 1-D array) of `count` values, and a logged column of other length.
    """
    values = _as_list(returned)
    if values is None:
        raise UserError(
            f"reward function {name!r} returned {_shown(returned)}: return a list with one number (or None) for each "
            "completion"
        )
    if len(values) != count:
        raise UserError(
            f"reward function {name!r} returned {len(values)} values, expected {count}: "
            "return one number (or None) for each completion"
        )
    for column, logged in log.extra.items():
        if len(logged) != count:
            raise UserError(
                f"reward function {name!r} logged {len(logged)} values to the column {column!r}, expected {count}: "
                "give log_extra one for each completion"
            )
    return Output([_plain(value) for value in values], dict(log.metrics), dict(log.extra))


def joined(parts: list[Output]) -> Output:
    """The outputs of calls on some members each, as of one call on all of them, in order."""
    whole = Output([])
    for part in parts:
        before = len(whole.values)
        for column in part.extra:
            whole.extra.setdefault(column, [None] * before)
        for column, values in whole.extra.items():
            values += part.extra.get(column, [None] * len(part.values))
        for name, numbers in part.metrics.items():
            whole.metrics.setdefault(name, []).extend(numbers)
        whole.failures |= {before + member: failure for member, failure in part.failures.items()}
        whole.values += part.values
    return whole


def _plain(value: Any) -> float | str | None:
    if value is None:
        return None
    number = _number(value)
    return _shown(value) if number is None else number


def _as_list(output: Any) -> list[Any] | None:
    if isinstance(output, list | tuple):
        return list(output)
    # Tensors and arrays, without importing their libraries.
    return output.tolist() if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist") else None


def _number(value: Any) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of torch and NumPy
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number or fraction beyond float's range
        return math.inf


def _shown(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{shortened(repr(value))} ({type(value).__name__}{shape})"
