"""Objectives side by side: equal rollouts, equal updates, the same few learning rates to tune each.

    python benchmarks/learning/run.py staleness rare [--shard 0/2]

Every cell is run at each learning rate on the tuning seeds; the one with the highest reward at the end is then run on
the seeds that are reported. One JSON row a run is appended to results/TASK.jsonl; a run that is there is not made
again, so an interrupted command is given once more. --shard i/n takes every n-th cell, for several processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import EXPERIMENTS, PROTOCOLS, Cell, Protocol, Run, cells_of

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("task", choices=PROTOCOLS)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th")
    options = parser.parse_args()
    index, count = map(int, options.shard.split("/"))
    for cell in cells_of(options.experiment, options.task)[index::count]:
        measure(cell)


def measure(cell: Cell) -> None:
    """Tune a cell, then run it on the seeds that are reported."""
    protocol = PROTOCOLS[cell.task]
    for seed in protocol.tuning_seeds:
        for rate in protocol.learning_rates:
            make(cell.run(rate, seed))
    rate = best_rate(cell, protocol, read_results(cell.task))
    for seed in protocol.seeds:
        make(cell.run(rate, seed))


def best_rate(cell: Cell, protocol: Protocol, rows: Iterable[dict[str, Any]]) -> float:
    """The learning rate with the highest reward at the end, over the tuning seeds; the first of equals."""
    rows = list(rows)
    return max(
        protocol.learning_rates,
        key=lambda rate: fmean(find(cell.run(rate, seed), rows)["after"] for seed in protocol.tuning_seeds),
    )


def make(run: Run) -> None:
    """Make a run and append its row, unless it is there."""
    if find(run, read_results(run.cell.task)) is not None:
        return
    if run.cell.task in ("graded", "rare"):
        import enumerable as module
    else:
        import language as module
    start = time.perf_counter()
    row = {**run.key(), **module.run(run), "seconds": round(time.perf_counter() - start, 1)}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{run.cell.task}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)
    # A trainer is part of reference cycles: without this, several runs' weights and moments wait to be freed.
    gc.collect()


def read_results(task: str) -> list[dict[str, Any]]:
    """All rows of a task so far."""
    file = RESULTS / f"{task}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def find(run: Run, rows: Iterable[dict[str, Any]]) -> Any:
    """The row of a run, or None. The experiment's name does not count: a setting is run once."""
    key = {name: value for name, value in run.key().items() if name != "experiment"}
    return next((row for row in rows if key.items() <= row.items()), None)


if __name__ == "__main__":
    main()
