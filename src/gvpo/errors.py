"""What the user can fix, said in one line: what is wrong, where (file, line, field), and how to fix it."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake, in one line.

    The command line prints the line and exits with code 2; a traceback always means a bug of ours.
    """


class FieldError(UserError):
    """A wrong value in one field; `field` is its path (`completions[1].reward`, members from 0), `problem` the rest."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[FieldError], tuple[str, str]]:
        return FieldError, (self.field, self.problem)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put where it happened ("data.jsonl, line 3") in front of a UserError from inside the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{', ' if isinstance(error, FieldError) else ': '}{error}") from error


def nearest(name: str, valid: Collection[str]) -> str:
    """A hint that ends a message about an unknown name: the nearest valid one, else all of them (at most ten)."""
    if close := difflib.get_close_matches(name, valid, n=1, cutoff=0.7):
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(map(repr, sorted(valid)[:10])) or 'none'}"


def shortened(text: str, limit: int = 80) -> str:
    """`text` on one line, white space collapsed, cut to at most `limit` characters with `...` at the cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def error_line(error: BaseException) -> str:
    """An exception on one line: type, text (cut at 300 characters) and the file and line of its innermost frame."""
    text = shortened(str(error), 300)
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({_place(error)})"


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}:{line}"
