"""What a person sees in the terminal while a run goes on: a bar or lines, a table of completions, a small plot.

Model output and prompts are not trusted: nothing of them is read as markup or reaches the terminal as a control code.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from gvpo.groups import Completion, Group

METRICS = (
    "reward",
    "loss",
    "r2",
    "frac_reward_zero_std",
    "log_ratio/mean",
    "completions/mean_length",
    "completions/truncated",
    "grad_norm",
)
"""What lines and bar show of an update's row, the most telling first: a narrow bar shows the first ones."""


class ProgressDisplay:
    """A run's progress: in a terminal a live bar below the lines, elsewhere the lines alone.

    total: updates of the run. start: updates made before a resume. enabled: False shows nothing (other processes).
    console: where to, default standard output. A context manager; the bar goes when the block ends, whatever happens.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._enabled = enabled
        self._total = total
        self._update = start
        columns = (
            TextColumn("update", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            TimeElapsedColumn(Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(*columns, console=self._console, disable=not self._live, expand=True)
        self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def update(self, row: Mapping[str, Any], line: bool) -> None:
        """Show an update's row of metrics; without "update" in it, the latest update's (an evaluation).

        line: whether this update is to leave a line.
        """
        self._update = int(row.get("update", self._update))
        metrics = plain(format_metrics(row))
        self._bar.update(self._task, completed=self._update, description=metrics)
        if line:
            self.note(f"update {self._update}/{self._total}  {metrics}")

    def note(self, item: Any) -> None:
        """A line of text, or anything else that rich can show, such as a table, above the bar."""
        if not self._enabled:
            return
        if isinstance(item, str):
            self._console.print(Text(plain(item)), soft_wrap=True)
        else:
            self._console.print(item)


def format_metrics(row: Mapping[str, Any]) -> str:
    """The evaluations of a row, then the metrics of METRICS that it has: "reward 0.5  loss 0.012"."""
    evaluations = [name for name in row if name.startswith("eval/")]
    return "  ".join(f"{name} {row[name]:.4g}" for name in [*evaluations, *METRICS] if row.get(name) is not None)


def completions_table(groups: Sequence[Group], count: int, weights: Sequence[float] | None = None) -> Table:
    """A table of at most `count` completions: of each group, in order, the best and the worst by reward.

    weights: w of every completion of the groups, end to end, for a column of its own. With count above two a group,
    more of each group is shown. Members without a reward are shown where a group has no others.
    """
    table = Table(expand=True)
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column("completion", ratio=2, overflow="fold")
    table.add_column("source")
    for number in ["reward"] if weights is None else ["reward", "weight"]:
        table.add_column(number, justify="right")
    left, first = count, 0
    for group in groups:
        shown = _best_and_worst(group, max(2, count // len(groups)))[:left]
        for place, member in enumerate(shown):
            completion = group.completions[member]
            cells = [
                Text(shorten(plain(_prompt_text(group)), 100)) if place == 0 else Text(),
                Text(shorten(plain(_completion_text(completion)), 300)),
                Text(plain(completion.source)),
                Text("-" if completion.reward is None else f"{completion.reward:.4g}"),
            ]
            weight = [] if weights is None else [Text(f"{weights[first + member]:+.4g}")]
            table.add_row(*cells, *weight, end_section=place == len(shown) - 1)
        left, first = left - len(shown), first + group.k
    return table


def plot(values: Sequence[float], *, width: int = 60, height: int = 8, title: str = "") -> str:
    """A line through `values`, finite and in order, as `height` lines of text under the title.

    width, height: columns and rows of the plot itself, at least 2. More values than columns are averaged, fewer are
    joined by straight lines. The labels on the left are the highest and the lowest point drawn.
    """
    if not values:
        return f"{title}: no values".removeprefix(": ")
    columns = _resample(values, width)
    low, high = min(columns), max(columns)
    span = high - low or 1.0
    levels = [round((value - low) / span * (height - 1)) for value in columns]
    labels = {0: f"{low:.4g}", **({height - 1: f"{high:.4g}"} if high > low else {})}
    margin = max(map(len, labels.values()))
    rows = [
        f"{labels.get(level, ''):>{margin}} {'┤' if level in labels else '│'}{row}".rstrip()
        for level, row in reversed(list(enumerate(_draw(levels, height))))
    ]
    return "\n".join([*([title] if title else []), *rows])


def plain(text: str) -> str:
    """Text as one line that cannot act on a terminal: no escape sequences, no control characters, ⏎ for line ends."""
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(char for char in text if unicodedata.category(char) not in _UNSHOWN)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning and the end, where the question and the answer are."""
    tail = (limit - 3) // 3
    return text if len(text) <= limit else f"{text[: limit - 3 - tail]} … {text[-tail:]}"


_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*[0-~]"
)
"""ANSI: colours and cursor moves (CSI), titles and links (OSC), the short ones."""

_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control characters, invisible ones that reorder a line, halves of surrogate pairs, exotic line ends."""


def _best_and_worst(group: Group, count: int) -> list[int]:
    """Members by reward, highest first: the first and the last, `count` in all."""
    rewards = {place: value for place, value in enumerate(group.rewards) if value is not None}
    ranked = sorted(rewards, key=rewards.__getitem__, reverse=True) or list(range(group.k))
    return ranked if len(ranked) <= count else ranked[: count - count // 2] + ranked[len(ranked) - count // 2 :]


def _prompt_text(group: Group) -> str:
    if group.prompt is None:
        return str(group.prompt_ids)
    if isinstance(group.prompt, str):
        return group.prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in group.prompt)


def _completion_text(completion: Completion) -> str:
    return str(completion.token_ids) if completion.text is None else completion.text or "(empty)"


def _resample(values: Sequence[float], width: int) -> list[float]:
    count = len(values)
    if count >= width:
        edges = [column * count // width for column in range(width + 1)]
        return [fmean(values[start:end]) for start, end in pairwise(edges)]
    places = [column * (count - 1) / (width - 1) for column in range(width)]
    return [
        values[int(place)] + (place - int(place)) * (values[min(int(place) + 1, count - 1)] - values[int(place)])
        for place in places
    ]


def _draw(levels: Sequence[int], height: int) -> list[str]:
    """The rows, lowest first: each column joins the level before it to its own."""
    grid = [[" "] * len(levels) for _ in range(height)]
    for column, (before, level) in enumerate(zip([levels[0], *levels], levels, strict=False)):
        if before == level:
            grid[level][column] = "─"
            continue
        grid[before][column], grid[level][column] = ("╯", "╭") if level > before else ("╮", "╰")
        for between in range(min(before, level) + 1, max(before, level)):
            grid[between][column] = "│"
    return ["".join(row) for row in grid]
