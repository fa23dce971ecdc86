"""What a reference costs in memory: the peak of a short run on the embedded model, for every schedule.

    python benchmarks/reference_memory.py [--updates 2]

Every run is a process of its own. Its peak is counted from the end of loading on (where the system lets a process reset
it), so it is that of training: 2 groups of 2 short completions an update. Full fine-tuning, and LoRA of rank 64 on all
linear layers; with a GPU the peak of allocated memory there as well. Prints a table, beside what is to be expected: the
copies of the trainable parameters that a schedule holds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
CHECKPOINT, OTHER = "checkpoint", "model"
SCHEDULES: list[tuple[str | int, str]] = [
    ("rollout", "cpu"),
    ("initial", "cpu"),
    ("initial", "disk"),
    (1, "cpu"),
    (1, "disk"),
    (CHECKPOINT, "cpu"),
    (CHECKPOINT, "disk"),
    (OTHER, "cpu"),
]
TRAININGS = ("full", "lora")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def measure(training: str, reference: str | int, storage: str, updates: int, folder: Path) -> dict[str, Any]:
    """One run, in this process. folder: where the model lies, and the checkpoints to be anchored to."""
    import torch

    from gvpo import GVPOConfig, GVPOTrainer, load_model

    model, tokenizer = load_model(folder / OTHER)
    if training == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    paths = {OTHER: folder / OTHER, CHECKPOINT: folder / training / "checkpoints" / "step-1"}
    config = GVPOConfig(
        reference=str(paths[reference]) if reference in paths else reference,
        reference_storage=storage,
        groups_per_update=2,
        num_generations=2,
        max_completion_length=8,
        max_steps=updates,
        disable_tqdm=True,
    )
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}."}]} for word in WORDS]
    trainer = GVPOTrainer(model, rows, _length, config=config, tokenizer=tokenizer)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _reset_peak()
    trainer.train()
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "gpu_peak": torch.cuda.max_memory_allocated() if on_gpu else None,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "trainable": sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
        "model": sum(p.nbytes for p in trainer.model.parameters()),
        "held": sum(value.nbytes for value in trainer.reference.state_dict().values()),
    }


def prepare(folder: Path) -> None:
    """The embedded model in a folder, and for each way to train a checkpoint after one update."""
    from peft import LoraConfig, get_peft_model

    from gvpo import GVPOConfig, GVPOTrainer, load_model

    for training in TRAININGS:
        model, tokenizer = load_model(MODEL)
        assert tokenizer is not None
        if training == "full":
            model.save_pretrained(folder / OTHER)
            tokenizer.save_pretrained(folder / OTHER)
        else:
            model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))  # pyright: ignore
        config = GVPOConfig(max_steps=1, save_steps=1, output_dir=str(folder / training), disable_tqdm=True)
        row = {"prompt": "Say", "completions": [" one.", " two."], "rewards": [0.0, 1.0]}
        GVPOTrainer(model, [row], config=config, tokenizer=tokenizer).train()


def expected(training: str, reference: str | int, storage: str, row: dict[str, Any]) -> tuple[str, float]:
    """What is held beside the policy, in words and in bytes of memory."""
    if reference == OTHER:
        return "a whole model", row["model"] if training == "full" else row["model"] - row["trainable"]
    if reference == "rollout":
        return "nothing", 0
    if reference == "initial" and training == "lora":
        return "nothing: the adapter is switched off", 0
    return ("1 copy", row["trainable"]) if storage == "cpu" else ("nothing; 2 copies on the disk", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        task = json.loads(options.one)
        folder = Path(task.pop("folder"))
        print(json.dumps(prepare(folder) if not task else measure(**task, folder=folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _in_a_process(folder=folder)
        for training in TRAININGS:
            rows = []
            for reference, storage in SCHEDULES:
                how = {"training": training, "reference": reference, "storage": storage}
                rows.append((reference, storage, _in_a_process(folder=folder, updates=options.updates, **how)))
                print(how, rows[-1][-1], file=sys.stderr, flush=True)
            _print_table(training, rows)


def _in_a_process(**task: Any) -> Any:
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def _reset_peak() -> None:
    """Linux alone can forget a process's peak; elsewhere loading counts."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _print_table(training: str, rows: list[tuple[str | int, str, dict[str, Any]]]) -> None:
    base = rows[0][-1]
    on_gpu = base["gpu"] is not None
    trained = base["trainable"] / 2**20
    machine = f"{os.cpu_count()} processors, {base['gpu'] or 'no GPU'}, torch {version('torch')}"
    print(f"\n{MODEL}, {training}: {trained:.0f} MiB of trainable parameters; {machine}")
    columns = ["`reference`", "`reference_storage`", "held beside the policy", "expected, MiB", "measured, MiB"]
    columns += ["peak, MiB", *(["measured on the GPU, MiB", "peak there, MiB"] if on_gpu else [])]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for reference, storage, row in rows:
        what, size = expected(training, reference, storage, row)
        cells = [str(reference), storage, what, f"{size / 2**20:.0f}"]
        for name in ["peak", *(["gpu_peak"] if on_gpu else [])]:
            cells += [f"{(row[name] - base[name]) / 2**20:+.0f}", f"{row[name] / 2**20:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
