"""One measurement in a process of its own: python measure.py JOB-AS-JSON prints its row as the last line."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cases import CASES, Case, Job


@dataclass(frozen=True)
class Shape:
    """What a Llama-like model's matrix products depend on, under the names of its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a model's config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def operations(shape: Shape, case: Case) -> dict[str, float]:
    """Floating-point operations that one step of a case cannot do without: the matrix products of body and head.

    Prompts are read once a group. generation: 2 a weight and token; the head for drawn
    tokens alone. training: 3 times such a forward pass. Left out: attention's own products, the optimizer, the head's
    softmax.
    """
    body = layer_weights(shape) * shape.num_hidden_layers
    head = shape.hidden_size * shape.vocab_size
    prompts, drawn = case.prompts * case.prompt_tokens, case.completion_tokens
    # A completion's last token is drawn and never read by the sampler, nor by the update.
    read = prompts + drawn - case.prompts * case.k
    forward = 2.0 * (body * read + head * drawn)
    return {"generation": forward, "training": 3 * forward}


def layer_weights(shape: Shape) -> int:
    """Weights of one layer's matrices."""
    return sum(inputs * outputs for inputs, outputs in layer_shapes(shape))


def layer_shapes(shape: Shape) -> list[tuple[int, int]]:
    """Inputs and outputs of one layer's matrices: queries, keys, values, output, gate, up, down."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        *[(hidden, inner)] * 2,
        (inner, hidden),
    ]


def matrix_peak(shape: Shape, setting: str, *, rows: int = 2048, tries: int = 5) -> float:
    """Operations a second that torch reaches on all of this model's matrix products, of `rows` tokens at a time."""
    import torch

    dtype = torch.bfloat16 if setting == "bf16" else torch.float32
    shapes = [(one, shape.num_hidden_layers) for one in layer_shapes(shape)]
    shapes.append(((shape.hidden_size, shape.vocab_size), 1))
    seconds = work = 0.0
    for (inputs, outputs), count in shapes:
        x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        best = float("inf")
        for _ in range(tries):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - start)
        seconds += count * best
        work += count * 2.0 * rows * inputs * outputs
    return work / seconds


def measure(job: Job) -> dict[str, Any]:
    """The job's row."""
    # Imported here, in the subprocess alone: a child's peak of memory begins with its parent's.
    import plain
    import systems
    import torch
    import transformers
    import trl

    case = CASES[job.case]
    row = job.key() | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "processor": processor(),
    }
    if job.system == "peak":
        from forced import make_model

        shape = Shape.of(make_model(case)[0].config)
        return row | {"shape": asdict(shape), "operations_per_second": matrix_peak(shape, job.setting)}
    run = {
        "gvpo": systems.run_gvpo,
        "trl": systems.run_trl,
        "plain": plain.run_plain,
        "sampler": systems.run_sampler,
        "generate": systems.run_generate,
    }[job.system]
    steps = run(case, job.setting, job.warmup + job.steps, reset_peak)[job.warmup :]
    return row | {"steps": steps, "peak_bytes": everyones_peak(), "completion_tokens": case.completion_tokens}


def reset_peak() -> None:
    """Linux alone can forget a process's peak; elsewhere loading counts."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most bytes of memory that this process held since `reset_peak`."""
    if sys.platform == "linux":
        # ru_maxrss would begin with the peak of the process that started this one.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def everyones_peak() -> list[int]:
    """The peak of every process of this measurement."""
    from torch import distributed

    if not distributed.is_initialized():
        return [peak()]
    peaks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(peaks, peak())
    return peaks


def processor() -> str:
    """Its name, as the system gives it."""
    import platform

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_a_process(job: Job) -> dict[str, Any]:
    """The job's row, measured in a subprocess (or several, joined by torchrun), on all cores."""
    import subprocess

    count = CASES[job.case].processes
    launcher = [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [] if count == 1 else ["--nproc_per_node", str(count)]
    # CPUs alone: the GPU has a benchmark of its own.
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // count)), "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, __file__, json.dumps(asdict(job))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    row = measure(Job(**json.loads(sys.argv[1])))
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(row), flush=True)
