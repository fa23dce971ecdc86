"""A run with everything that a checkpoint must hold, points in it to strike at, and what two runs must have alike."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from training_helpers import VOCABULARY, prompts, same_weights, settings, tiny_model

from gvpo.sampling import torch_sampler
from gvpo.training import checkpoint, loop, run_folder
from gvpo.training.loop import GVPOTrainer

Point = tuple[Any, str]

POINTS: dict[str, Callable[[GVPOTrainer], Point]] = {
    "sampling": lambda trainer: (torch_sampler, "draw_tokens"),
    "reward": lambda trainer: (sys.modules[__name__], "noise"),
    "reference": lambda trainer: (loop, "score_groups"),
    "backward": lambda trainer: (loop, "group_gradients"),
    "step": lambda trainer: (trainer.optimizer, "step"),
    "after the step": lambda trainer: (type(trainer.scheduler), "step"),
    "evaluation": lambda trainer: (loop, "answer_greedily"),
    "completions": lambda trainer: (run_folder, "write_groups"),
    "rows": lambda trainer: (run_folder.RunFolder, "append"),
    "checkpoint": lambda trainer: (checkpoint, "save_file"),
    "its state": lambda trainer: (checkpoint, "_write_state"),
    "pruning": lambda trainer: (checkpoint, "remove_folder"),
}
"""What is called in each phase of a run."""


def noise() -> float:
    """A draw from every generator."""
    return random.random() + float(np.random.normal()) + float(torch.rand(()))


def noisy(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float | None]:
    """Noisy rewards, now and then None."""
    draws = [noise() for _ in completion_ids]
    return [None if d > 2.5 else ids[0] / VOCABULARY + d / 10 for ids, d in zip(completion_ids, draws, strict=True)]


SOURCES = [{"type": "policy"}, {"type": "replay", "members": 1, "groups": 1, "capacity": 5}]


def trainer_in(
    folder: Path | None, seed: int = 0, process: int = 0, sources: Any = SOURCES, **options: Any
) -> GVPOTrainer:
    """Six updates of 2 groups, 2 a rollout, with replay, evaluations, and a snapshot as reference.

    seed: of the weights, and with the process of all generators.
    """
    values = {
        "output_dir": None if folder is None else str(folder),
        "max_steps": 6,
        "reference": 2,
        "eval_steps": 2,
        "eval_on_start": True,
        **options,
    }
    model = tiny_model(seed)
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(100 * seed + process)
    return GVPOTrainer(model, prompts(3), noisy, config=settings(**values), eval_dataset=prompts(2), sources=sources)


def strike(point: Point, call: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Have `action` done at the start of that call (from 1). Returns what undoes the wrapping."""
    owner, name = point
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)
    return lambda: setattr(owner, name, real)


def differences(one: Path, other: Path) -> list[str]:
    """The files of two finished runs that differ: metrics, completions, model, and the last checkpoint's tensors."""
    names = {
        file.relative_to(folder).as_posix()
        for folder in (one, other)
        for place in ("completions", "model")
        for file in (folder / place).iterdir()
        if file.name != "README.md"  # names its own folder
    }
    differ = [name for name in [*sorted(names), "metrics.jsonl"] if _bytes(one / name) != _bytes(other / name)]
    last = [run_folder.checkpoints(folder)[-1] for folder in (one, other)]
    for name in ("parameters", "optimizer", "reference"):
        tensors = [load_file(folder / f"{name}.safetensors") for folder in last]
        if not same_weights(*tensors):
            differ.append(f"{last[0].name}/{name}")
    return differ


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None
