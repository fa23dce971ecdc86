"""A training step, side by side: this trainer, TRL's GRPOTrainer at its best, a plain loop; and how the step grows.

    python benchmarks/step/run.py [--only main k prompt] [--steps 5] [--repeats 3] [--out runs/benchmarks/step]
    python benchmarks/step/run.py --report [--figures docs/figures]

Same model (SmolLM2-135M), prompts and completion lengths for all; on the processor alone. `main`: 8 prompts of
46 tokens, 8 completions each of at most 32; `long`: 2 prompts of 512, 16 completions each. TRL's settings
(micro-batches, dtypes) are tried first, and the fastest of each precision is measured, as TRL comes and of all.
`sampler`: this sampler against `model.generate`. The others are growth series of this trainer. Every measurement is a
process of its own, and its first step is left out (except of those in `long` that take minutes). One JSON row each is
appended to OUT/results.jsonl; one that is there is not made again, so an interrupted command is given once more. Needs
the extras `gguf` and `dev`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from cases import GROWTH, LONG, MAIN, OURS, PLAIN, PRECISIONS, SLOW_TRL, TRL, Case, Job
from measure import in_a_process

COMPARED = {"main": MAIN, "long": LONG}
PARTS = [*COMPARED, "sampler", *GROWTH]
GROWTH_SETTING = "bf16"
TRL_GROWTH = ("k", "prompt", "completion", "groups")
CHEAP = 16_384
"""Padded positions of a step up to which --trl-growth has TRL run it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a measurement, after the first")
    parser.add_argument("--slow-steps", type=int, default=1, help="those of TRL and the plain loop in `long`")
    parser.add_argument("--growth-steps", type=int, default=3, help="those of the growth series, which have no repeats")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything but the growth is measured")
    parser.add_argument("--trl-growth", action="store_true", help="TRL in the growth series too, where it is cheap")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step"))
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and measure nothing")
    parser.add_argument("--figures", type=Path, help="with --report: folder to draw the figures in (default: OUT)")
    options = parser.parse_args()
    if not options.report:
        for part in options.only:
            measure_part(part, options)
    from report import write_report

    write_report(read_results(options.out), options.figures or options.out)


def measure_part(part: str, options: argparse.Namespace) -> None:
    """All measurements of a part. TRL's tries come first, as they decide what else is to be measured."""
    if part in COMPARED:
        for job in tries(part):
            make(job, options.out)
        best = best_settings(COMPARED[part], read_results(options.out))
        for repeat in range(options.repeats):
            for job in compared(part, best, repeat, options):
                make(job, options.out)
    elif part == "sampler":
        for repeat in range(options.repeats):
            for system in ("sampler", "generate"):
                for setting in PLAIN:
                    make(Job(MAIN.name, system, setting, 1, options.steps, repeat), options.out)
    else:
        for job in growth(part, options):
            make(job, options.out)


def tries(part: str) -> Iterator[Job]:
    """TRL's settings. In `long` without a first step, as one takes minutes, nor the slowest of `main`."""
    first, left_out = (0, SLOW_TRL) if part == "long" else (1, ())
    yield from (Job(COMPARED[part].name, "trl", name, first, 1, stage="try") for name in TRL if name not in left_out)


def compared(part: str, best: list[str], repeat: int, options: argparse.Namespace) -> Iterator[Job]:
    """One repeat: the machine's peak, then every system, each in all its precisions."""
    case = COMPARED[part]
    slow = (0, options.slow_steps) if part == "long" else (1, options.steps)
    yield from (Job(case.name, "peak", setting, 0, 1, repeat) for setting in PLAIN)
    ours = OURS if part == "main" else PRECISIONS
    yield from (Job(case.name, "gvpo", setting, 1, options.steps, repeat) for setting in ours)
    yield from (Job(case.name, "trl", setting, *slow, repeat) for setting in best)
    yield from (Job(case.name, "plain", setting, *slow, repeat) for setting in PLAIN)


def growth(part: str, options: argparse.Namespace) -> Iterator[Job]:
    """A growth series."""
    for case in GROWTH[part]:
        peak_of = case.name if case.model is not None else MAIN.name
        yield Job(peak_of, "peak", GROWTH_SETTING, 0, 1)
        yield Job(case.name, "gvpo", GROWTH_SETTING, 1, options.growth_steps)
        if options.trl_growth and part in TRL_GROWTH and case.padded_tokens <= CHEAP:
            yield Job(case.name, "trl", "bf16 weights, 8", 1, options.growth_steps)


def best_settings(case: Case, rows: Iterable[dict[str, Any]]) -> list[str]:
    """TRL's fastest settings that were tried for this case: of each precision, as it comes and of all."""
    tried = [row for row in rows if (row["case"], row["system"], row["stage"]) == (case.name, "trl", "try")]
    fastest = [row["setting"] for row in sorted(tried, key=step_seconds)]
    as_it_comes = [name for name in fastest if not TRL[name].keeps_memory]

    def first(names: list[str], precision: str) -> list[str]:
        return [name for name in names if TRL[name].precision == precision][:1]

    found = [name for precision in PLAIN for names in (as_it_comes, fastest) for name in first(names, precision)]
    return list(dict.fromkeys(found))


def step_seconds(row: dict[str, Any], part: str = "whole") -> float:
    """The median over a row's steps."""
    return median(step[part] for step in row["steps"])


def make(job: Job, out: Path) -> None:
    """Measure a job and append its row, unless it is there."""
    if any(job.key().items() <= row.items() for row in read_results(out)):
        return
    start = time.perf_counter()
    row = in_a_process(job)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = (
        f"{step_seconds(row):.2f} s a step" if "steps" in row else f"{row['operations_per_second'] / 1e9:.0f} GFLOP/s"
    )
    name = f"{job.case}: {job.system}, {job.setting}, {job.stage} {job.repeat}"
    print(f"{name}: {shown} ({time.perf_counter() - start:.0f} s in all)", flush=True)


def read_results(out: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
