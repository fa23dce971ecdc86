"""What the default of updates_per_rollout is worth: the demo's task under GVPOConfig's own values.

    python benchmarks/defaults.py [--updates 40] [--seeds 2] [--out runs/benchmarks/defaults.jsonl]

Every run makes the same number of updates from the same number of completions; they differ only in how many updates
share one rollout, that is, in how stale the completions are when they are trained on. Prints a table; a run that is in
the file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gvpo import GVPOConfig, GVPOTrainer
from gvpo.cli.demo import FULL_MARKS, brevity, make_task

UPDATES_PER_ROLLOUT = (1, 2, 4, 8)


def run(updates_per_rollout: int, seed: int, updates: int) -> dict[str, Any]:
    """One run: held-out share of exact answers at its end, and what it took."""
    train, held_out = make_task(seed)
    config = GVPOConfig(
        updates_per_rollout=updates_per_rollout,
        seed=seed,
        max_steps=updates,
        max_completion_length=10,
        reward_weights=[0.8, 0.2],
        disable_tqdm=True,
    )
    trainer = GVPOTrainer("smollm2-135m", train, [FULL_MARKS, brevity], config=config, eval_dataset=held_out)
    start = time.perf_counter()
    trainer.train()
    rows = trainer.history
    return {
        "updates_per_rollout": updates_per_rollout,
        "seed": seed,
        "updates": updates,
        "after": rows[-1][f"eval/rewards/{FULL_MARKS}/mean"],
        "reward": fmean(row["reward"] for row in rows),
        "largest_log_ratio": max(row["log_ratio/max"] for row in rows),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/defaults.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for seed, per_rollout in product(range(options.seeds), UPDATES_PER_ROLLOUT):
        key = {"updates_per_rollout": per_rollout, "seed": seed, "updates": options.updates}
        if not any(key.items() <= row.items() for row in rows):
            rows.append(run(per_rollout, seed, options.updates))
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    _print_table([row for row in rows if row["updates"] == options.updates], options.updates)


def _print_table(rows: list[dict[str, Any]], updates: int) -> None:
    print(f"\n{updates} updates; {os.cpu_count()} processors, torch {torch.__version__}")
    print("| updates_per_rollout | exact after, per seed | mean reward of the run | largest log-ratio, nats |")
    print("|---|---|---|---|")
    for per_rollout in UPDATES_PER_ROLLOUT:
        same = [row for row in rows if row["updates_per_rollout"] == per_rollout]
        if same:
            after = ", ".join(f"{row['after']:.1%}" for row in same)
            reward = ", ".join(f"{row['reward']:.2f}" for row in same)
            print(f"| {per_rollout} | {after} | {reward} | {max(row['largest_log_ratio'] for row in same):.1f} |")


if __name__ == "__main__":
    main()
