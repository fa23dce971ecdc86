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
from collections.abc import Mapping
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

_COUNTERS = ("update", "rollout", "position", "batch")


@dataclass
class Progress:
    """Where a run is. update, rollout: how many are done or begun; position: rows drawn so far; batch: updates already
    made from `groups`, the current rollout's groups, all processes' in order; reward_metrics: what its reward functions
    logged."""

    update: int = 0
    rollout: int = 0
    position: int = 0
    batch: int = 0
    groups: list[Group] = field(default_factory=list)
    reward_metrics: dict[str, float] = field(default_factory=dict)


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
        save_file(_on_cpu(parameters), folder / "parameters.safetensors")
        save_file(_optimizer_tensors(optimizer, parameters), folder / "optimizer.safetensors")
        save_file(_rng_tensors(), folder / "rng.safetensors")
        if snapshot := reference.state_dict():
            save_file(_on_cpu(snapshot), folder / "reference.safetensors")
        if progress.groups:
            write_groups(progress.groups, folder / "groups.jsonl")
        state = {
            "format": FORMAT,
            **{name: getattr(progress, name) for name in _COUNTERS},
            "groups": len(progress.groups),
            "reward_metrics": progress.reward_metrics,
            "scheduler": scheduler.state_dict(),
            "random": random.getstate(),
            "numpy": _numpy_state(),
        }
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
    # Everything is read before anything is changed.
    state = _state(folder)
    parameters = _trainable(module)
    saved, moments, rng = (_tensors(folder / f"{name}.safetensors") for name in ("parameters", "optimizer", "rng"))
    snapshot_file = folder / "reference.safetensors"
    snapshot = _tensors(snapshot_file) if snapshot_file.exists() else {}
    groups = list(read_groups(folder / "groups.jsonl")) if state["groups"] else []
    if len(groups) != state["groups"]:
        raise UserError(f"checkpoint {str(folder)!r}: groups.jsonl is damaged; resume from an older one")
    if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in saved.items()}:
        raise UserError(f"checkpoint {str(folder)!r}: its parameters are not this model's; resume with its config")
    reference.load_state_dict(snapshot)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    _load_optimizer(moments, optimizer, parameters)
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    _set_rng(rng, state["random"], state["numpy"])
    counters = {name: state[name] for name in _COUNTERS}
    return Progress(**counters, reward_metrics=state["reward_metrics"], groups=groups)


def prune_checkpoints(checkpoints: list[Path], keep: int | None) -> None:
    """Delete the oldest of these (oldest first) until `keep` are left."""
    for folder in checkpoints[: max(0, len(checkpoints) - keep)] if keep else []:
        shutil.rmtree(folder)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    states = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"cuda/{index}"] = torch.cuda.get_rng_state(index)
    return states


def _numpy_state() -> dict[str, Any]:
    state: dict[str, Any] = np.random.get_state(legacy=False)  # pyright: ignore[reportAssignmentType]
    return state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}}


def _set_rng(states: dict[str, Tensor], python: list[Any], numpy: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy | {"state": {"key": key, "pos": numpy["state"]["pos"]}})
    for index in range(torch.cuda.device_count()):
        if f"cuda/{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda/{index}"], index)
    random.setstate((python[0], tuple(python[1]), python[2]))


def _state(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    if not file.is_file():
        raise UserError(f"checkpoint {str(folder)!r}: no state.json; give a folder checkpoints/step-N of a run")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint {str(folder)!r}: state.json is damaged; resume from an older one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint {str(folder)!r}: written by another version of gvpo; resume with that version")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(file)!r}: damaged or missing ({error}); resume from an older one") from error
