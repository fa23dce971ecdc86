"""What long commands show of themselves: a bar in a terminal and nothing in a pipe; and how they are stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A bar on standard error, where that is a terminal; yields what moves it: (how many are done, a text beside it).

    what: is counted, such as "groups". total: None = endless.
    """
    if not sys.stderr.isatty():
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(bar_width=20))
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


@dataclass
class Stop:
    """Whether the command is to end, and with which exit code."""

    code: int | None = None


@contextmanager
def stoppable(name: str, after: str) -> Iterator[Stop]:
    """Within the block Ctrl-C and SIGTERM ask to end, after what is being done; a second one ends it at once.

    name: the command; after: what it ends after, for the line that says so in a terminal.
    """
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        stop.code = CODES[signal.Signals(number)]
        for each, handler in before.items():
            signal.signal(each, handler)
        if sys.stderr.isatty():
            os.write(2, f"\n{name}: ending after {after}; once more ends it at once\n".encode())

    before = {number: signal.signal(number, ask) for number in CODES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
