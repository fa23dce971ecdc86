"""The tables of docs/sources.md, from results/*.jsonl.

    python benchmarks/sources/report.py

Means over the seeds that reached the goal, with 95 % intervals (Student's t); the last column is the mean ratio of
tokens to the on-policy run's of the same seed (same task, start and prompts), over the seeds that reached the goal both
times.
"""

from __future__ import annotations

import json
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from arms import ARMS
from run import GOAL, RESULTS, SEEDS
from scipy.stats import t as student

BASE = "on-policy"


def main() -> None:
    for file in sorted(RESULTS.glob("*.jsonl")):
        print(f"\n### {file.stem}: until {GOAL:.0%} of held-out answers are right\n\n{markdown(read(file))}")


def read(file: Any) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for every arm that has runs."""
    lines = [
        "| sources | reached | updates | tokens drawn | CPU-seconds | tokens against on-policy |",
        "|---|---|---|---|---|---|",
    ]
    base = {row["seed"]: row for row in rows if row["arm"] == BASE and row["reached"]}
    for arm in ARMS:
        own = {row["seed"]: row for row in rows if row["arm"] == arm}
        reached = {seed: row for seed, row in own.items() if row["reached"]}
        if not own:
            continue
        cells = [interval([row[name] for row in reached.values()]) for name in ("update", "tokens", "cpu_seconds")]
        ratios = [row["tokens"] / base[seed]["tokens"] for seed, row in reached.items() if seed in base]
        cells.append("" if arm == BASE else interval(ratios, 2))
        open_runs = "" if len(own) == len(SEEDS) else " (open)"
        lines.append(f"| {arm} | {len(reached)} of {len(own)}{open_runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float], digits: int = 0) -> str:
    """Mean and half of the 95 % interval."""
    if len(values) < 2:
        return ", ".join(f"{value:.{digits}f}" for value in values) or "-"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return f"{fmean(values):,.{digits}f} ± {half:,.{digits}f}"


if __name__ == "__main__":
    main()
