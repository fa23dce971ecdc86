"""Checkpoints: everything a run needs to go on, in safetensors and JSON; nothing is pickled.

`checkpoints/step-N/` holds parameters.safetensors (trainable parameters), optimizer.safetensors, reference.safetensors
(where the reference is a snapshot), rng.safetensors, groups.jsonl (the rollout that is being trained on) and
state.json. Sampling and the order of the data are functions of the seed and of counters in state.json: they have no
state of their own. Covered: one process, and data-parallel copies. Not covered: sharded parameters.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Group
from gvpo.training.reference import Reference
from gvpo.training.run_folder import new_folder

FORMAT = 1


@dataclass
class Progress:
    """Where a run is. update, rollout: how many are done or begun; position: rows drawn so far; batch: updates already
    made from `groups`, the current rollout's groups, all processes' in order."""

    update: int = 0
    rollout: int = 0
    position: int = 0
    batch: int = 0
    groups: list[Group] = field(default_factory=list)


def save_checkpoint(
    target: Path,
    progress: Progress,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    reference: Reference,
) -> None:
    """Write a checkpoint folder, whole or not at all. Raises UserError on a full disk; older checkpoints stay."""
    parameters = _trainable(module)
    with new_folder(target) as folder:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / "parameters.safetensors")
        save_file(_optimizer_tensors(optimizer, parameters), folder / "optimizer.safetensors")
        save_file(_rng_tensors(), folder / "rng.safetensors")
        if snapshot := reference.state_dict():
            save_file({name: value.cpu().contiguous() for name, value in snapshot.items()}, folder / "reference.safetensors")
        if progress.groups:
            write_groups(progress.groups, folder / "groups.jsonl")
        counters = {name: getattr(progress, name) for name in ("update", "rollout", "position", "batch")}
        state = {"format": FORMAT, **counters, "scheduler": scheduler.state_dict(), "random": random.getstate()}
        (folder / "state.json").write_text(json.dumps(state))


def load_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    reference: Reference,
) -> Progress:
    """Put a checkpoint's state into these objects and return where the run was.

    Raises UserError for a folder that is no checkpoint, is damaged, or is of another model.
    """
    state = _state(folder)
    parameters = _trainable(module)
    saved = _tensors(folder / "parameters.safetensors")
    if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in saved.items()}:
        raise UserError(f"checkpoint {str(folder)!r}: its parameters are not those of this model; resume with its config")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    _load_optimizer(_tensors(folder / "optimizer.safetensors"), optimizer, parameters)
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if (folder / "reference.safetensors").exists():
        reference.load_state_dict(_tensors(folder / "reference.safetensors"))
    _set_rng(_tensors(folder / "rng.safetensors"), state["random"])
    groups = list(read_groups(folder / "groups.jsonl")) if (folder / "groups.jsonl").exists() else []
    return Progress(state["update"], state["rollout"], state["position"], state["batch"], groups)


def prune_checkpoints(checkpoints: list[Path], keep: int | None) -> None:
    """Delete the oldest of these (oldest first) until `keep` are left."""
    for folder in checkpoints[: max(0, len(checkpoints) - keep)] if keep else []:
        shutil.rmtree(folder)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    saved: dict[str, Tensor], optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    for key, value in saved.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        # Step counters stay where the optimizer keeps them; moments live beside their parameter.
        place = parameter.device if value.dim() or optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter][entry] = value.to(place)


def _rng_tensors() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}  # pyright: ignore
    states["numpy_place"] = torch.tensor(np.random.get_state()[2])  # pyright: ignore
    for index in range(torch.cuda.device_count()):
        states[f"cuda/{index}"] = torch.cuda.get_rng_state(index)
    return states


def _set_rng(states: dict[str, Tensor], python: list[Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(states["numpy_place"])))
    for index in range(torch.cuda.device_count()):
        if f"cuda/{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda/{index}"], index)
    random.setstate((python[0], tuple(python[1]), python[2]))


def _state(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    if not file.is_file():
        raise UserError(f"checkpoint {str(folder)!r}: no state.json; give a folder checkpoints/step-N of a run")
    try:
        state = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"checkpoint {str(folder)!r}: state.json is damaged; resume from an older one") from error
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {str(folder)!r}: written by another version of gvpo; resume with that version")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(file)!r}: damaged or missing ({error}); resume from an older one") from error
