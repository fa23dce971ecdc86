"""Inputs of the cost model that a CPU can measure: verl's own worker, with gloo, one and two ranks; no GPU.

    python benchmarks/scale/measure.py [--repeats 3] [--ranks 1 2]     # where verl is installed; a minute or two

Prints the machine and three tables. Passes: the scoring of a mini-batch without gradients over verl's own step on it
(forward, backward, optimizer), on a random Llama in float32, with gradient checkpointing and without; compute alone
decides there. Own work: what the plug-in does beside passes, on 1,024 groups of 4 and 8 in 4 mini-batches, every one
scored: its gathers, its copies and sums over tokens, the slopes. Rows: `group_order` on the driver, with verl's
partition, and the slopes of a mini-batch on every rank. Medians. A rank is a process with one thread. Worker, batch and
environment are those of tests/verl_plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

TESTS = Path(__file__).parents[2] / "tests" / "verl_plugin"
PROMPTS, MINI_BATCHES, PROMPT, COMPLETION = 1024, 4, 100, 600
PASS_ROWS, PASS_TOKENS = 16, 128
LLAMA = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192}
ORDERS = [(4, 1), (4, 2), (8, 1), (8, 2), (4, 64), (64, 64)]
"""k and ranks."""


def load(name: str) -> ModuleType:
    """A file of tests/verl_plugin as a module."""
    source = (TESTS / f"{name}.py").read_text(encoding="utf-8")
    module = ModuleType(name)
    module.__file__ = str(TESTS / f"{name}.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed_call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed_call


def make_rows(groups: int, k: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """As engine_process makes them, of equal lengths."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    return [
        {
            "uid": f"group {group}",
            "session_id": member,
            "prompt": torch.randint(2, 73, (prompt,), generator=numbers),
            "answer": torch.randint(2, 73, (completion,), generator=numbers),
            "reward": float(torch.rand((), generator=numbers)),
            "old": -4 + torch.randn(completion, generator=numbers),
            "ref": -4 + torch.randn(completion, generator=numbers),
            "mask": torch.ones(completion, dtype=torch.long),
        }
        for group in range(groups)
        for member in range(k)
    ]


def as_step(engine: ModuleType, rows: list[dict[str, Any]], mini_batches: int, case: dict[str, Any]) -> Any:
    """This rank's part of what the driver sends for a step whose log-ratios are not 0."""
    from verl.utils import tensordict_utils as tu

    mine = len(rows) // case["ranks"]
    batch = engine.as_batch(rows[case["rank"] * mine : (case["rank"] + 1) * mine])
    size = len(rows) // mini_batches
    tu.assign_non_tensor(batch, gvpo_recomputed=False, global_batch_size=size, mini_batch_size=size, epochs=1, seed=1)
    tu.assign_non_tensor(batch, dataloader_kwargs={"shuffle": False})
    return batch


def measure_passes(engine: ModuleType, worker: Any, case: dict[str, Any]) -> dict[str, float]:
    """Seconds of a probe, and of verl's own step on the same mini-batch."""
    probes: list[float] = []
    updates: list[float] = []
    worker.engine.infer_batch = timed(worker.engine.infer_batch, probes)
    worker.engine.train_batch = timed(worker.engine.train_batch, updates)
    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            worker.engine.module.gradient_checkpointing_enable({"use_reentrant": False})
        probes.clear(), updates.clear()
        rows = make_rows(PASS_ROWS * case["ranks"] // 4, 4, PASS_TOKENS // 2, PASS_TOKENS // 2)
        for _ in range(1 + case["repeats"]):
            worker.train_mini_batch(as_step(engine, rows, 1, case))
        found |= {f"probe {checkpointing:d}": statistics.median(probes[1:])}
        found |= {f"update {checkpointing:d}": statistics.median(updates[1:])}
    del worker.engine.infer_batch, worker.engine.train_batch
    return found


def measure_own_work(engine: ModuleType, worker: Any, case: dict[str, Any], k: int) -> dict[str, float]:
    """Seconds of a step's work beside passes: with passes that do nothing, less those of a loss of verl's own."""
    import torch

    def no_scoring(data: Any, **named: Any) -> dict[str, Any]:
        return {"model_output": {"log_probs": data["input_ids"].float()}}

    def no_step(data: Any, **named: Any) -> dict[str, Any]:
        return {"model_output": {}, "loss": [0.0], "metrics": {"grad_norm": 0.0}}

    worker.engine.infer_batch, worker.engine.train_batch = no_scoring, no_step
    exact, rows = worker.loss_fn, make_rows(PROMPTS, k, PROMPT, COMPLETION)
    config = exact.keywords["config"]
    plain = partial(exact.func, config=SimpleNamespace(policy_loss=SimpleNamespace(loss_mode="vanilla")))
    seconds: dict[Any, list[float]] = {exact: [], plain: []}
    for _ in range(1 + case["repeats"]):
        for loss in (exact, plain):
            batch = as_step(engine, rows, MINI_BATCHES, case)
            worker.set_loss_fn(loss)
            if case["ranks"] > 1:
                torch.distributed.barrier()
            timed(worker.train_mini_batch, seconds[loss])(batch)
    worker.set_loss_fn(partial(exact.func, config=config))
    with_gvpo, without = (statistics.median(seconds[loss][1:]) for loss in (exact, plain))
    return {"own work": with_gvpo - without, "loop": without}


def measure_order(k: int, ranks: int) -> float:
    """Seconds of `group_order` for rows in the order in which they were completed."""
    from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

    from gvpo.integrations.order import group_order

    numbers = random.Random(0)
    names = [f"group {group}" for group in range(PROMPTS) for _ in range(k)]
    numbers.shuffle(names)
    loads = [float(numbers.randint(PROMPT, PROMPT + 2 * COMPLETION)) for _ in names]
    start = time.perf_counter()
    group_order(names, loads, MINI_BATCHES, ranks, partial(get_seqlen_balanced_partitions, equal_size=True))
    return time.perf_counter() - start


def measure_slopes(k: int) -> float:
    """Seconds of `row_slopes` for one of the mini-batches, on one thread."""
    import torch

    from gvpo.objective import Rows, row_slopes

    torch.set_num_threads(1)
    numbers, count = torch.Generator().manual_seed(0), PROMPTS * k
    groups_N = torch.randperm(PROMPTS, generator=numbers).repeat(k)
    rewards_N, refs_N, ratios_N = torch.rand(3, count, generator=numbers, dtype=torch.float64)
    rows = Rows(groups_N, torch.arange(count), rewards_N, refs_N, torch.ones(count, dtype=torch.bool))
    here_N = groups_N % MINI_BATCHES == 0
    start = time.perf_counter()
    row_slopes(rows, here_N, ratios_N, 0.1)
    return time.perf_counter() - start


def one_rank(folder: str, case: dict[str, Any]) -> None:
    """Measure in this process, one of case["ranks"]; rank 0 prints."""
    sys.argv = ["engine_process", folder, json.dumps(case)]
    engine = load("engine_process")
    worker = engine.make_worker()
    if case["job"] == "passes":
        found = measure_passes(engine, worker, case)
    else:
        found = measure_own_work(engine, worker, case, case["k"])
    if case["rank"] == 0:
        print("RESULT " + json.dumps(found), flush=True)
    engine.torch.distributed.destroy_process_group()


def run(folder: str, environment: dict[str, str], **case: Any) -> dict[str, float]:
    """All ranks of a case, each in a process; what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        case |= {"port": free.getsockname()[1], "micro_batch": 4, "dynamic": False}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--case", json.dumps(case | {"rank": rank}), "--folder", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(case["ranks"])
    ]
    outputs = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            sys.exit(errors[-4000:])
    return json.loads(next(line for line in outputs[0][0].splitlines() if line.startswith("RESULT ")).split(" ", 1)[1])


def make_model(conftest: ModuleType, made: Path) -> Path:
    """A random Llama that is large enough for its products to take the time, with the tests' tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = conftest.folder.__wrapped__(SimpleNamespace(mktemp=lambda name: made))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**LLAMA, **heads, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def machine() -> str:
    import torch
    import verl

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores, {processor}; torch {torch.__version__}, verl {verl.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        one_rank(options.folder, options.case)
        return
    conftest = load("conftest")
    environment = conftest.environment.__wrapped__()
    os.environ.update(environment)
    sys.path.insert(0, str(TESTS))
    common = {"repeats": options.repeats}
    with tempfile.TemporaryDirectory() as made:
        folder = str(make_model(conftest, Path(made)))
        print(machine() + "\n")
        print("| ranks | checkpointing | probe, s | verl's step, s | probe / step |\n|---|---|---|---|---|")
        for ranks in options.ranks:
            found = run(folder, environment, job="passes", ranks=ranks, **common)
            for on in (0, 1):
                probe, update = found[f"probe {on}"], found[f"update {on}"]
                print(f"| {ranks} | {'on' if on else 'off'} | {probe:.3f} | {update:.3f} | {probe / update:.3f} |")
        print("\n| ranks | rows | own work a step, s | a row and mini-batch, s | verl's loop beside passes, s |")
        print("|---|---|---|---|---|")
        for ranks in options.ranks:
            for k in (4, 8):
                found = run(folder, environment, job="own work", ranks=ranks, k=k, **common)
                own, loop = found["own work"], found["loop"]
                a_row = own / PROMPTS / k / MINI_BATCHES
                print(f"| {ranks} | {PROMPTS * k:,} | {own:.3f} | {a_row:.1e} | {loop:.3f} |")
    print("\n| ranks | rows | order, s | a row, s | slopes of a mini-batch, s | a row, s |\n|---|---|---|---|---|---|")
    for k, ranks in ORDERS:
        measure_slopes(k)
        order = statistics.median(measure_order(k, ranks) for _ in range(options.repeats))
        slopes = statistics.median(measure_slopes(k) for _ in range(options.repeats))
        cells = [f"{order:.3f}", f"{order / PROMPTS / k:.1e}", f"{slopes:.4f}", f"{slopes / PROMPTS / k:.1e}"]
        print(f"| {ranks} | {PROMPTS * k:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
