"""Checkpoints: everything a run needs to go on, in safetensors and JSON; nothing is pickled.

`checkpoints/step-N/` holds parameters.safetensors (trainable parameters), optimizer.safetensors, reference.safetensors
(where the reference is a snapshot), rng.safetensors, groups.jsonl (the rollout that is being trained on) and
state.json. Sampling and the order of the data are functions of the seed and of counters in state.json: they have no
state of their own. Covered: one process, and data-parallel copies. Not covered: sharded parameters.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvpo.errors import UserError, located
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Group
from gvpo.training.reference import Reference, trainable
from gvpo.training.run_folder import checkpoints, new_folder

FORMAT = 1

_COUNTERS = ("update", "rollout", "position", "batch", "generated_tokens")
_KEYS = {"sha256", "run", *_COUNTERS, "groups", "reward_metrics", "scheduler", "random", "numpy"}


@dataclass
class Progress:
    """Where a run is. update, rollout: how many are done or begun; position: rows drawn so far; batch: updates already
    made from `groups`, the current rollout's groups, all processes' in order; reward_metrics: what its reward functions
    logged; generated_tokens: drawn so far."""

    update: int = 0
    rollout: int = 0
    position: int = 0
    batch: int = 0
    groups: list[Group] = field(default_factory=list)
    reward_metrics: dict[str, float] = field(default_factory=dict)
    generated_tokens: int = 0


@dataclass
class TrainingState:
    """All that changes while a run goes on. run: what a checkpoint must agree with to go on as the same run."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reference: Reference
    run: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)

    def save(self, target: Path, groups: Sequence[Group]) -> None:
        """Write a checkpoint folder, whole or not at all. groups: all processes' groups in flight, in order.

        Raises UserError on a full disk; older checkpoints stay.
        """
        parameters = dict(trainable(self.module))
        with new_folder(target) as folder:
            save_file(_on_cpu(parameters), folder / "parameters.safetensors")
            save_file(_optimizer_tensors(self.optimizer, parameters), folder / "optimizer.safetensors")
            save_file(_rng_tensors(), folder / "rng.safetensors")
            if snapshot := self.reference.state_dict():
                save_file(_on_cpu(snapshot), folder / "reference.safetensors")
            if groups:
                write_groups(groups, folder / "groups.jsonl")
            state = {
                "format": FORMAT,
                "sha256": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
                "run": dict(self.run),
                **{name: getattr(self.progress, name) for name in _COUNTERS},
                "groups": len(groups),
                "reward_metrics": self.progress.reward_metrics,
                "scheduler": self.scheduler.state_dict(),
                "random": random.getstate(),
                "numpy": _numpy_state(),
            }
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; progress.groups are then all processes' groups in flight.

        Raises UserError for a folder that is no checkpoint, is damaged, or is of another model or run; nothing has
        changed then.
        """
        # Everything is read, and compared with what was written, before anything is changed.
        state = _state(folder)
        _check_files(folder, state["sha256"])
        _check_same_run(folder, state["run"], self.run)
        parameters = dict(trainable(self.module))
        saved, moments, rng = (_tensors(folder / f"{name}.safetensors") for name in ("parameters", "optimizer", "rng"))
        snapshot_file = folder / "reference.safetensors"
        snapshot = _tensors(snapshot_file) if snapshot_file.exists() else {}
        groups = list(read_groups(folder / "groups.jsonl")) if state["groups"] else []
        if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in saved.items()}:
            raise UserError(f"checkpoint {str(folder)!r}: its parameters are not this model's; resume with its config")
        with located(f"checkpoint {str(folder)!r}"):
            self.reference.load_state_dict(snapshot)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        _load_optimizer(moments, self.optimizer, parameters)
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        _set_rng(rng, state["random"], state["numpy"])
        counters = {name: state[name] for name in _COUNTERS}
        self.progress = Progress(**counters, reward_metrics=state["reward_metrics"], groups=groups)


def find_checkpoint(resume: Literal[True] | str | Path, output_dir: str | None) -> Path:
    """The checkpoint that is meant: a folder, or (True, "latest") the newest in output_dir.

    Raises UserError if there is none.
    """
    if resume is not True and resume != "latest":
        _state_file(Path(resume))
        return Path(resume)
    found = checkpoints(output_dir)
    if not found:
        raise UserError(f"output_dir {output_dir!r}: no checkpoint to resume from; set save_steps")
    return found[-1]


def is_of_run(checkpoint: Path | None, output_dir: str | None) -> bool:
    """Whether a checkpoint lies in this run's own folder: one of another run does not make output_dir that run's."""
    if checkpoint is None or output_dir is None:
        return False
    return checkpoint.resolve().parent.parent == Path(output_dir).resolve()


def prune_checkpoints(checkpoints: list[Path], keep: int | None) -> None:
    """Delete the oldest of these (oldest first) until `keep` are left."""
    for folder in checkpoints[: max(0, len(checkpoints) - keep)] if keep else []:
        shutil.rmtree(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise UserError(f"checkpoint {str(folder / name)!r}: damaged or missing; resume from an older one")


def _check_same_run(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"checkpoint {str(folder)!r}: made with {name}={theirs.get(name)!r}, this run has {name}={value!r}; "
                "resume with the run's own config and data"
            )


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


def _state_file(folder: Path) -> Path:
    file = folder / "state.json"
    if not file.is_file():
        raise UserError(f"checkpoint {str(folder)!r}: no state.json; give a folder checkpoints/step-N of a run")
    return file


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_file(folder).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint {str(folder)!r}: state.json is damaged; resume from an older one") from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"checkpoint {str(folder)!r}: state.json is damaged; resume from an older one")
    if state["format"] != FORMAT or not state.keys() >= _KEYS:
        raise UserError(f"checkpoint {str(folder)!r}: written by another version of gvpo; resume with that version")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(file)!r}: damaged or missing ({error}); resume from an older one") from error
