"""What reward functions in killable processes cost, and how many answers math_accuracy compares: Markdown tables.

    python benchmarks/rewards.py [--workers 2] [--problems FILE...] [--repeats 5]

Call: an empty function, one member a call and eight, called here and in the pool; start: a pool from nothing; replace:
a call that crashes, and the next one. Comparisons: the completions `\\boxed{answer}` of `--problems` (rows with
answers; without any, 500 made here), each beside its own answer and beside the next problem's, which needs the whole
comparison: math-verify in a plain loop on one core, the accepted answer parsed each time, and math_accuracy in the
pool (a new one each time), in groups of eight that differ in their other words, and one each. Overlap: a rollout whose
reward waits 50 ms a completion (as for a judge), begun with each group or after all are drawn. Medians and ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gvpo.groups import Completion, Group
from gvpo.rewards import resolve_rewards, score_groups
from gvpo.rewards.calling import Scoring
from gvpo.rewards.limits import Limits

FUNCTIONS = """
import os, time

def empty(*, completions, **columns):
    return [1.0] * len(completions)

def crash(*, completions, **columns):
    os.abort()

def slow_ids(*, completion_ids, **columns):
    time.sleep(0.05 * len(completion_ids))
    return [float(len(ids) % 7) for ids in completion_ids]
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--problems", nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "measured.py").write_text(FUNCTIONS)
        sys.path.insert(0, folder)
        calls(args.workers, args.repeats)
        overlap(args.workers, args.repeats)
    comparisons(args.workers, args.repeats, args.problems)
    return 0


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that warms up."""
    work()
    return [once(work) for _ in range(repeats)]


def once(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def shown(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median, and range."""
    low, high = min(values) * scale, max(values) * scale
    return f"{statistics.median(values) * scale:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def calls(workers: int, repeats: int) -> None:
    """The cost of a call beyond the function's own work."""
    here = resolve_rewards(["measured:empty"], Limits(workers=0))
    pooled = resolve_rewards(["measured:empty"], Limits(workers=workers))
    print("| what | milliseconds |\n|---|---|")
    for k in (1, 8):
        groups = [Group("p", [Completion("a")] * k) for _ in range(1000)]
        for name, functions in (("here", here), (f"pool of {workers}", pooled)):
            seconds = timed(lambda functions=functions, groups=groups: score_groups(groups, functions, None), repeats)
            print(f"| a call, {k} member{'s' * (k > 1)}, {name} | {shown(seconds, 1000 / len(groups), 3)} |")
    one = [Group("p", [Completion("a")])]
    alone = timed(lambda: score_groups(one, pooled, None), repeats)
    print(f"| a call alone, pool of {workers} | {shown(alone, 1000, 3)} |")
    start = timed(lambda: resolve_rewards(["measured:empty"], Limits(workers=workers)), repeats)
    print(f"| a pool from nothing | {shown(start, 1000, 0)} |")
    (crash,) = resolve_rewards(["measured:crash"], Limits(workers=1))
    replaced = timed(lambda: crash.function.submit("crash", {"completions": ["a"]}, 1).result(), min(repeats, 15))
    print(f"| a call that crashes, its worker replaced | {shown(replaced, 1000, 1)} |\n")


def overlap(workers: int, repeats: int) -> None:
    """A rollout and its rewards, which take 0.4 s a group."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gvpo.sampling import SamplingParams, TorchSampler
    from gvpo.sources.dataset import read_rows
    from gvpo.sources.fill import fill_groups
    from gvpo.sources.policy import PolicySource

    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=512, eos_token_id=None, pad_token_id=None))
    rows = read_rows([{"prompt_ids": [n + 1]} for n in range(8)])
    # Ends after some 130 tokens on average, so that groups end one after another.
    source = PolicySource(TorchSampler(model, set(range(500, 504))), None, SamplingParams(512))

    def draw(on_group: Callable[..., None] | None = None) -> list[Group]:
        return fill_groups(rows, [source], 8, list(range(8)), None, on_group)

    def rollout(workers: int, *, early: bool) -> Callable[[], Any]:
        functions = resolve_rewards(["measured:slow_ids"], Limits(workers=workers))

        def work() -> None:
            scoring = Scoring(functions, None)
            scoring.report(draw(lambda _, group: scoring.start(group) if early else None))

        return work

    print("| 8 groups of 8, a reward of 0.4 s a group | seconds |\n|---|---|")
    for name, work in (
        ("drawing alone", draw),
        (f"drawing, rewards begun with each group, pool of {workers}", rollout(workers, early=True)),
        (f"drawing, then rewards, pool of {workers}", rollout(workers, early=False)),
        ("drawing, then rewards, in this process", rollout(0, early=False)),
    ):
        print(f"| {name} | {shown(timed(work, repeats))} |")
    print()


def comparisons(workers: int, repeats: int, files: list[str]) -> None:
    """Mathematical comparisons a second."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    answers = [row["answers"][0] for row in rows] or [rf"\frac{{{n}}}{{{n + 7}}}" for n in range(1, 501)]
    print(f"| {len(answers)} answers | beside | comparisons a second |\n|---|---|---|")
    for name, given in (("its own", answers), ("the next problem's", [*answers[1:], answers[0]])):
        texts = [rf"So we get \boxed{{{answer}}}." for answer in given]
        plain = timed(
            lambda texts=texts: [math_verify_alone(*one) for one in zip(texts, answers, strict=True)], repeats
        )
        print(f"| math-verify, one core, a plain loop | {name} | {shown([len(texts) / s for s in plain], 1, 0)} |")
        for k, members in ((8, "groups of 8"), (1, "one each")):
            groups = [
                Group("p", [Completion(f"Variant {n}. {text}") for n in range(k)], columns={"answers": answer})
                for text, answer in zip(texts, answers, strict=True)
            ]
            # A new pool each time: a worker remembers what it has parsed.
            pools = [resolve_rewards("math_accuracy", Limits(workers=workers)) for _ in range(repeats)]
            seconds = [once(partial(score_groups, groups, functions, None)) for functions in pools]
            rates = shown([k * len(groups) / s for s in seconds], 1, 0)
            print(f"| math_accuracy, pool of {workers}, {members} | {name} | {rates} |")


def math_verify_alone(text: str, answer: str) -> bool:
    """What a reward function does that takes math-verify as it comes."""
    from math_verify import parse, verify

    gold = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    return verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)


if __name__ == "__main__":
    raise SystemExit(main())
