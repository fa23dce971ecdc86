"""Results and comparisons as tables for a terminal or a text file; nothing in them is read as markup."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

NONE = "-"
_WIDEST = 10_000  # a name of any length, and every number whole

_COMPARISON_NOTES = """\
A - B and its interval: points of pass@1. won, lost: problems of which A has more, or fewer, right. p: two-sided, exact;
McNemar's where k = 1, else by flipping the signs of the problems' differences.
"""


def results_text(results: Mapping[str, Any]) -> str:
    """A run's results, as `results.suite_results` gives them: a table, and what it says of the drawing."""
    settings, tasks, average = results["settings"], results["tasks"], results["average"]
    several = [name for name, task in tasks.items() if task["num_samples"] > 1]
    partial = any(task["mean_reward"] is not None for task in tasks.values())
    head = ["task", "problems", "k", "pass@1", "95 % interval", "unscored", "truncated", "tokens", "if right", "wrong"]
    if partial:
        head.append("reward")
    rows = [
        [
            name,
            task["problems"],
            task["num_samples"],
            _percent(task["pass@1"]),
            _interval(task["interval"]),
            task["unscored"],
            _percent(task["truncated"]),
            *(_number(task[length]) for length in ("mean_length", "mean_length_right", "mean_length_wrong")),
            *([_number(task["mean_reward"], 3)] if partial else []),
        ]
        for name, task in tasks.items()
    ]
    if len(tasks) > 1:
        rows.append(["average", "", "", _percent(average["pass@1"]), _interval(average["interval"])])
    parts = [
        _settings_line(settings),
        "Shares in percent; tokens: the mean length, that of right ones, of wrong ones.\n",
    ]
    parts.append(table(head, rows))
    if several:
        parts.append(_several(tasks, several))
    if any(task["interval"]["by"] == "wilson" for task in tasks.values()):
        parts.append(
            "w: Wilson's interval; all problems of the task have the same share, which bootstraps to a point.\n"
        )
    parts += [_unscored_line(name, task) for name, task in tasks.items() if task["unscored"]]
    parts += [_uncompared_line(name, task) for name, task in tasks.items() if task.get("uncompared")]
    return "".join(parts)


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """A comparison, as `compare.compare_runs` gives it."""
    head = ["task", "problems", "k", "A", "B", "A - B", "95 % interval", "won", "lost", "p", "least for p < 0.05"]
    rows = [
        [
            name,
            task["problems"],
            task["num_samples"],
            _percent(task["a"]),
            _percent(task["b"]),
            _signed(task["difference"]),
            _signed_interval(task["interval"]),
            task["won"],
            task["lost"],
            p_value(task["p"]),
            NONE if task["least"] is None else f"{100 * task['least']:.2f} ({task['least_right']} right)",
        ]
        for name, task in comparison["tasks"].items()
    ]
    average = comparison["average"]
    if len(rows) > 1:
        values = [_percent(average["a"]), _percent(average["b"]), _signed(average["difference"])]
        rows.append(["average", "", "", *values, _signed_interval(average["interval"])])
    differing = comparison["differing_settings"]
    lines = [f"A: {comparison['a']}", f"B: {comparison['b']}"]
    lines += [f"{name}: A {one}, B {other}" for name, (one, other) in differing.items()]
    return "\n".join(lines) + "\n" + table(head, rows) + _COMPARISON_NOTES


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table, the first column to the left, the others to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(str, row), *[""] * (len(head) - len(row)))
    console = Console(file=io.StringIO(), width=_WIDEST, markup=False, highlight=False, emoji=False, color_system=None)
    console.print(made)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def p_value(p: float) -> str:
    """Three digits that count, and no 0 where it is none."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}" if p > 0 else "< 1e-300"


def _several(tasks: Mapping[str, Any], names: Sequence[str]) -> str:
    """What several completions a problem say."""
    counts = sorted({int(j) for name in names for j in tasks[name]["pass@"]})
    rows = [
        [name, _percent(tasks[name]["maj@k"]), *(_percent(tasks[name]["pass@"].get(str(j))) for j in counts)]
        for name in names
    ]
    return table(["task", "maj@k", *(f"pass@{j}" for j in counts)], rows)


def _unscored_line(name: str, task: Mapping[str, Any]) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in task["failures"].items())
    told = f" (the reward function failed: {causes})" if causes else ""
    return f"{name}: {task['unscored']} completions have no verdict, and count as not right{told}\n"


def _uncompared_line(name: str, task: Mapping[str, Any]) -> str:
    return f"{name}: {task['uncompared']} comparisons of answers failed, which count as different in maj@k\n"


def _settings_line(settings: Mapping[str, Any]) -> str:
    names = ("model", "server", "completions", "template", "max_completion_length", "seed")
    told = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
    drawn = {
        name: f"temperature {task['temperature']:g}, top_p {task['top_p']:g}"
        for name, task in settings["tasks"].items()
        if "temperature" in task
    }
    judges = {name: f"reward {task['reward']}" for name, task in settings["tasks"].items()}
    return ", ".join([*told, *_of_tasks(drawn), *_of_tasks(judges)]) + "\n"


def _of_tasks(told: Mapping[str, str]) -> list[str]:
    """What is told of tasks, once; with their names where it differs."""
    different = list(dict.fromkeys(told.values()))
    if len(different) < 2:
        return different
    return [f"{one} ({', '.join(name for name, text in told.items() if text == one)})" for one in different]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f}"


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}"


def _interval(interval: Mapping[str, Any] | None) -> str:
    if interval is None:
        return NONE
    mark = " w" if interval["by"] == "wilson" else ""
    return f"{100 * interval['low']:.2f} to {100 * interval['high']:.2f}{mark}"


def _signed_interval(interval: Mapping[str, float] | None) -> str:
    return NONE if interval is None else f"{_signed(interval['low'])} to {_signed(interval['high'])}"
