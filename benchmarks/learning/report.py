"""The tables and figures of docs/experiments.md, from results/*.jsonl.

    python benchmarks/learning/report.py [--figures docs/figures]

Means over the reported seeds with 95 % intervals (Student's t); a difference to GVPO is taken seed by seed, on the same
task, start and prompts. A cell that has not all its seeds yet is marked open.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cells import PROTOCOLS, Cell, cells_of
from run import best_rate, find, read_results
from scipy.stats import t as student


@dataclass(frozen=True)
class Table:
    """One experiment on one task: a row per value of `rows`, a column per value of `columns`, cells of one measure."""

    experiment: str
    task: str
    rows: tuple[str, ...]
    columns: str
    measure: str = "after"
    compare: str | None = "gvpo"


TABLES = [
    Table("language", "family", ("objective",), "updates_per_rollout"),
    Table("language", "family", ("objective",), "updates_per_rollout", "greedy"),
    Table("language", "family", ("objective",), "updates_per_rollout", "during"),
    Table("language", "sums", ("objective",), "updates_per_rollout"),
    Table("language", "sums", ("objective",), "updates_per_rollout", "during"),
    Table("staleness", "rare", ("objective",), "updates_per_rollout"),
    Table("staleness", "rare", ("objective",), "updates_per_rollout", "during"),
    Table("staleness", "graded", ("objective",), "updates_per_rollout"),
    Table("beta", "rare", ("updates_per_rollout",), "beta", compare=None),
    Table("beta", "graded", ("updates_per_rollout",), "beta", compare=None),
    Table("members", "rare", ("objective", "updates_per_rollout"), "members", compare=None),
    Table("ablations", "rare", ("objective",), "updates_per_rollout"),
    Table("ablations", "graded", ("objective",), "updates_per_rollout"),
    Table("anchored", "graded", ("objective",), "updates_per_rollout", "distance"),
    Table("anchored", "graded", ("objective",), "updates_per_rollout"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, help="folder to draw the figures in")
    options = parser.parse_args()
    for table in TABLES:
        print(f"\n### {table.experiment}, {table.task}: `{table.measure}`\n\n{markdown(table)}")
    if options.figures:
        draw_staleness(options.figures)


def markdown(table: Table) -> str:
    """The table as Markdown."""
    cells = cells_of(table.experiment, table.task)
    columns = list(dict.fromkeys(getattr(cell, table.columns) for cell in cells))
    names = list(dict.fromkeys(tuple(getattr(cell, name) for name in table.rows) for cell in cells))
    lines = [
        f"| {', '.join(table.rows)} | " + " | ".join(f"{table.columns} {column:g}" for column in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in names:
        shown = []
        for column in columns:
            cell = _cell(cells, table, name, column)
            other = _cell(cells, table, (table.compare, *name[1:]), column) if table.compare else None
            shown.append(entry(cell, other if other != cell else None, table.measure))
        lines.append(f"| {', '.join(map(str, name))} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def entry(cell: Cell, other: Cell | None, measure: str) -> str:
    """Mean and interval, the learning rate, and the difference to another cell where it is given."""
    values = of_seeds(cell, measure)
    if values is None:
        return "open"
    rates, rate = PROTOCOLS[cell.task].learning_rates, reported(cell)[0]["learning_rate"]
    text = f"{interval(values)} ({rate:g}{'*' if rate in (rates[0], rates[-1]) else ''})"
    theirs = of_seeds(other, measure) if other is not None else None
    if theirs is None:
        return text
    return f"{text}, Δ {interval([mine - other for mine, other in zip(values, theirs, strict=True)], sign=True)}"


def of_seeds(cell: Cell, measure: str) -> list[float] | None:
    """A measure of every reported seed at the learning rate that was tuned; None while some are missing."""
    return [row[measure] for row in reported(cell)] or None


def reported(cell: Cell) -> list[dict[str, Any]]:
    """The rows of the reported seeds at the learning rate that was tuned; empty while a run is missing."""
    protocol, rows = PROTOCOLS[cell.task], read_results(cell.task)
    tried = [find(cell.run(rate, seed), rows) for rate in protocol.learning_rates for seed in protocol.tuning_seeds]
    if None in tried:
        return []
    rate = best_rate(cell, protocol, rows)
    found = [find(cell.run(rate, seed), rows) for seed in protocol.seeds]
    return [] if None in found else found


def interval(values: list[float], *, sign: bool = False) -> str:
    """Mean ± half the width of the 95 % interval."""
    return f"{fmean(values):{'+' if sign else ''}.3f} ± {half_width(values):.3f}"


def half_width(values: list[float]) -> float:
    """Half the width of Student's 95 % interval of the mean."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def draw_staleness(folder: Path) -> None:
    """Reward at the end against updates per rollout, per objective, with intervals."""
    from gvpo.lab.style import BLUE, GREY, ORANGE, panels, save, styled

    colours = {
        "gvpo": BLUE,
        "dr_grpo": ORANGE,
        "grpo": "#E69F00",
        "rloo": "#009E73",
        "reinforce": GREY,
        "dpo": "#CC79A7",
    }
    shown = {
        "family": ("SmolLM2-135M, family relations", "language"),
        "rare": ("400 answers, rare reward", "staleness"),
    }
    with styled():
        figure, axes = panels("Where completions are stale, the objective begins to matter", len(shown))
        for axis, (task, (title, experiment)) in zip(axes, shown.items(), strict=True):
            cells = cells_of(experiment, task)
            for number, (objective, colour) in enumerate(colours.items()):
                places = [cell for cell in cells if cell.objective == objective and of_seeds(cell, "after")]
                values = [of_seeds(cell, "after") or [] for cell in places]
                # Side by side, so that no interval hides another.
                x = [cell.updates_per_rollout * 1.05 ** (number - 2.5) for cell in places]
                means, widths = [fmean(v) for v in values], [half_width(v) for v in values]
                axis.errorbar(x, means, widths, marker="o", capsize=3, color=colour, label=objective)
            axis.set_xscale("log", base=2)
            stale = sorted({cell.updates_per_rollout for cell in cells})
            axis.set_xticks(stale, [str(number) for number in stale])
            axis.set(title=title, xlabel="updates per rollout", ylabel="mean reward at the end")
        axes[-1].legend(ncols=2, loc="lower left", fontsize=12)
        folder.mkdir(parents=True, exist_ok=True)
        save(figure, folder, "staleness")


def _cell(cells: list[Cell], table: Table, name: tuple[Any, ...], column: Any) -> Cell:
    wanted = dict(zip(table.rows, name, strict=True)) | {table.columns: column}
    return next(cell for cell in cells if all(getattr(cell, key) == value for key, value in wanted.items()))


if __name__ == "__main__":
    main()
