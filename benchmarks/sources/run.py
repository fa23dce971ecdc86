"""Tokens drawn, and seconds, until 80 % of held-out answers are right, for different sources of a group's members.

    python benchmarks/sources/run.py demo [--shard 0/2] [--arms "on-policy" "history 4:4"]
    python benchmarks/sources/report.py

SmolLM2-135M-Instruct, 32 prompts that come again and again, groups of 8 completions, 8 groups an update, one rollout of
8 prompts at a time; five seeds. Every second update 100 held-out prompts are answered greedily; a run ends when 80 of
them are right, or after 60 updates (`family`: 30). One JSON row a run is appended to results/TASK.jsonl; a run that is
there is not made again. Seconds are those of the processor (all threads), without evaluations, loading and what else
the machine does. Needs the extra `tasks` for `family`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from arms import ARMS, task

from gvpo import GVPOConfig, GVPOTrainer, load_model

RESULTS = Path(__file__).parent / "results"
SEEDS, GOAL, EVERY = range(5), 0.8, 2
LONGEST_RUN = {"demo": 60, "family": 30}
"""Updates, by task."""


class Reached(Exception):
    """The goal is reached: the run may end."""


class Watched(GVPOTrainer):
    """A trainer that notes what every evaluation found, and what it had taken until then; and ends at the goal."""

    def watch(self, accuracy: str) -> None:
        """accuracy: the metric's name."""
        self.accuracy, self.evaluating, self.began = accuracy, 0.0, time.process_time()
        self.path: list[dict[str, float]] = []

    def _evaluate(self, report: Any) -> dict[str, float]:
        start = time.process_time()
        row = super()._evaluate(report)
        self.path.append(
            {
                "update": self.progress.update,
                "tokens": self.progress.generated_tokens,
                "cpu_seconds": round(start - self.began - self.evaluating, 1),
                "accuracy": row[self.accuracy],
            }
        )
        self.evaluating += time.process_time() - start
        print(self.path[-1], flush=True)
        if row[self.accuracy] >= GOAL:
            raise Reached
        return row


def run(task_name: str, arm_name: str, seed: int, start: tuple[Any, Any]) -> dict[str, Any]:
    """One run: the way to the goal."""
    data, arm, (model, tokenizer) = task(task_name, seed), ARMS[arm_name], start
    config = GVPOConfig(
        seed=seed,
        groups_per_update=8,
        updates_per_rollout=1,
        reference="rollout",
        max_steps=LONGEST_RUN[task_name],
        lr_scheduler_type="constant",
        reward_weights=data.weights,
        eval_steps=EVERY,
        eval_on_start=True,
        bf16=True,
        disable_tqdm=True,
        **{"num_generations": 8, **data.settings, **arm.settings},
    )
    trainer = Watched(
        copy.deepcopy(model),
        data.train,
        data.rewards,
        config=config,
        tokenizer=tokenizer,
        eval_dataset=data.held_out,
        sources=arm.sources,
    )
    trainer.watch(data.accuracy)
    began = time.perf_counter()
    with suppress(Reached):
        trainer.train()
    last = trainer.path[-1]
    reached = last["accuracy"] >= GOAL
    seconds = round(time.perf_counter() - began, 1)
    return {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "reached": reached,
        **last,
        "seconds": seconds,
        "path": trainer.path,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("demo", "family"))
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, from the i-th")
    options = parser.parse_args()
    index, count = map(int, options.shard.split("/"))
    file = RESULTS / f"{options.task}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    start = load_model("smollm2-135m")
    for arm, seed in list(product(options.arms, SEEDS))[index::count]:
        made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if any((row["arm"], row["seed"]) == (arm, seed) for row in made):
            continue
        print(f"{options.task}, {arm}, seed {seed}", flush=True)
        row = run(options.task, arm, seed, start)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
