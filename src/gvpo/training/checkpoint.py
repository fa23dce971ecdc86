"""Checkpoints: everything a run needs to go on, in safetensors and JSON; nothing is pickled.

`checkpoints/step-N/` holds parameters.safetensors (trainable parameters), optimizer.safetensors, reference.safetensors
(where the reference is a snapshot), rng.safetensors, groups.jsonl (the rollout that is being trained on),
metrics.jsonl (the run's rows so far), sources/NAME/ (what a source keeps) and state.json: the rest, and a hash of every
file. Sampling and the order of the data are functions of the seed and of counters in state.json: they have no state of
their own. Covered: one process, and data-parallel copies. Not covered: sharded parameters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvpo.errors import UserError, located
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Group
from gvpo.training.random_state import RandomState
from gvpo.training.reference import Reference, trainable
from gvpo.training.run_folder import checkpoints, disk, new_folder, remove_folder
from gvpo.training.same_run import RunIdentity

FORMAT = 2

_COUNTERS = ("update", "rollout", "position", "batch", "generated_tokens")


class Stateful(Protocol):
    """A source with a state of its own.

    One that changes it while a rollout is drawn has `mark()` as well: it returns a function that puts the state back to
    what it was at the call.
    """

    def save(self, folder: Path) -> None:
        """Write all of it into this new and empty folder, on the main process. Links to files elsewhere will do."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, on every process; nothing in the folder may be written to."""
        ...


@dataclass
class Progress:
    """Where a run is. update, rollout: how many are done or begun; position: rows drawn so far; batch: updates already
    made from `groups`, the current rollout's groups, all processes' in order; reward_metrics: what its reward functions
    logged; generated_tokens: drawn so far; row: the last update's metrics while they wait for its evaluation."""

    update: int = 0
    rollout: int = 0
    position: int = 0
    batch: int = 0
    groups: list[Group] = field(default_factory=list)
    reward_metrics: dict[str, float] = field(default_factory=dict)
    generated_tokens: int = 0
    row: dict[str, Any] | None = None

    def copy(self) -> Progress:
        """One that goes on on its own; the groups in it are the same."""
        return replace(self, groups=list(self.groups), reward_metrics=dict(self.reward_metrics))


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that a checkpoint can be made of while weights, optimizer, scheduler and history stay as they are.

    undo: what puts the sources back.
    """

    progress: Progress
    random: RandomState
    undo: list[Callable[[], None]]


@dataclass
class TrainingState:
    """All that changes while a run goes on. run: what a checkpoint must agree with to go on as the same run. sources:
    those with a state, by name."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    reference: Reference
    run: RunIdentity
    sources: Mapping[str, Stateful] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.set_mark()

    def set_mark(self) -> None:
        """From here on a checkpoint is one of now: to be called wherever a run may stop and go on."""
        undo = [source.mark() for source in self.sources.values() if hasattr(source, "mark")]  # pyright: ignore
        self.mark = Mark(self.progress.copy(), RandomState.now(), undo)

    def roll_back(self) -> None:
        """Put back what has changed since the mark, but for weights, optimizer, scheduler and history."""
        self.progress = self.mark.progress.copy()
        self.mark.random.restore()
        for undo in self.mark.undo:
            undo()

    def save(
        self, target: Path, groups: Sequence[Group], generators: Sequence[RandomState], history: Sequence[Mapping]
    ) -> None:
        """Write a checkpoint folder of the mark, whole or not at all; one that is there is of the same mark, and stays.

        groups: all processes' groups in flight, in order; generators: each process's. history: the rows so far.
        Raises UserError on a full disk; older checkpoints stay.
        """
        if target.exists():
            return
        parameters = dict(trainable(self.module))
        with new_folder(target) as folder:
            save_file(_on_cpu(parameters), folder / "parameters.safetensors")
            save_file(_optimizer_tensors(self.optimizer, parameters), folder / "optimizer.safetensors")
            tensors = {f"{rank}/{name}": t for rank, one in enumerate(generators) for name, t in one.torch.items()}
            save_file(tensors, folder / "rng.safetensors")
            if snapshot := self.reference.state_dict():
                save_file(_on_cpu(snapshot), folder / "reference.safetensors")
            if groups:
                write_groups(groups, folder / "groups.jsonl")
            (folder / "metrics.jsonl").write_text(_lines(history), encoding="utf-8")
            for name, source in self.sources.items():
                (folder / "sources" / name).mkdir(parents=True)
                source.save(folder / "sources" / name)
            _write_state(folder, self._state(len(groups), generators))

    def load(self, folder: Path, process: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
        """Go on from a checkpoint; progress.groups are then all processes' groups in flight.

        process: this one's number; it takes the generators of that one, counted on from 0 where there were fewer.
        Returns the rows so far, and what has changed in the config. Raises UserError for a folder that is no
        checkpoint, is damaged, or is of another model or run; nothing has changed then.
        """
        # Everything is read, and compared with what was written, before anything is changed.
        state, where = _read_state(folder), f"checkpoint {str(folder)!r}"
        with located(where):
            changed = self.run.check(state["fixed"], state["settings"])
        _check_sources(where, state["sources"], self.sources)
        _check_files(folder, state["files"])
        parameters = dict(trainable(self.module))
        saved, moments, rng = (_tensors(folder / f"{name}.safetensors") for name in ("parameters", "optimizer", "rng"))
        snapshot_file = folder / "reference.safetensors"
        snapshot = _tensors(snapshot_file) if snapshot_file.exists() else {}
        groups = list(read_groups(folder / "groups.jsonl")) if state["groups"] else []
        history = _rows((folder / "metrics.jsonl").read_text(encoding="utf-8"))
        if {name: p.shape for name, p in parameters.items()} != {name: value.shape for name, value in saved.items()}:
            raise UserError(f"{where}: its parameters are not this model's; resume with its config")
        with located(where):
            self.reference.load_state_dict(snapshot)
        for name, source in self.sources.items():
            source.load(folder / "sources" / name)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        _load_optimizer(moments, self.optimizer, parameters)
        _load_schedule(state["scheduler"], self.scheduler, self.optimizer)
        counters = {name: state[name] for name in _COUNTERS}
        self.progress = Progress(**counters, reward_metrics=state["reward_metrics"], groups=groups, row=state["row"])
        _generators(state["generators"], rng, process).restore()
        return history, changed

    def _state(self, groups: int, generators: Sequence[RandomState]) -> dict[str, Any]:
        progress = self.mark.progress
        return {
            "fixed": self.run.fixed,
            "settings": self.run.settings,
            **{name: getattr(progress, name) for name in _COUNTERS},
            "row": progress.row,
            "groups": groups,
            "reward_metrics": progress.reward_metrics,
            "scheduler": self.scheduler.state_dict(),
            "generators": [{"python": one.python, "numpy": one.numpy} for one in generators],
            "sources": list(self.sources),
        }


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
    """Delete the oldest of these (oldest first) until `keep` are left.

    Raises UserError for one that cannot be deleted.
    """
    for folder in checkpoints[: max(0, len(checkpoints) - keep)] if keep else []:
        with disk(folder):
            remove_folder(folder)


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    """state.json, the last file: the state with a hash of every other file, and a hash of that."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    text = json.dumps({"files": {file.relative_to(folder).as_posix(): _sha256(file) for file in files}, **state})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "state.json").write_text(f'{{"format": {FORMAT}, "sha256": "{digest}", "state": {text}}}\n')


def _state_file(folder: Path) -> Path:
    file = folder / "state.json"
    if not file.is_file():
        raise UserError(f"checkpoint {str(folder)!r}: no state.json; give a folder checkpoints/step-N of a run")
    return file


def _read_state(folder: Path) -> dict[str, Any]:
    damaged = f"checkpoint {str(folder)!r}: state.json is damaged; resume from an older one"
    try:
        written = json.loads(_state_file(folder).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(damaged) from error
    if not isinstance(written, dict) or "format" not in written:
        raise UserError(damaged)
    if written["format"] != FORMAT:
        raise UserError(f"checkpoint {str(folder)!r}: written by another version of gvpo; resume with that version")
    state: dict[str, Any] = written.get("state", {})
    # JSON gives back what it was made of, number by number: the text, and so its hash, can be made again.
    if hashlib.sha256(json.dumps(state).encode()).hexdigest() != written.get("sha256"):
        raise UserError(damaged)
    return state


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_file(folder: Path, name: str) -> None:
    """Refuse a checkpoint whose file of that name is not the one that was written. Raises UserError."""
    _check_files(folder, {name: _read_state(folder)["files"].get(name, "")})


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    for name, digest in expected.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise UserError(f"checkpoint {str(folder / name)!r}: damaged or missing; resume from an older one")


def _check_sources(where: str, theirs: Sequence[str], ours: Mapping[str, Stateful]) -> None:
    for name in ours:
        if name not in theirs:
            raise UserError(f"{where}: holds nothing of the source {name!r}; resume with the run's own sources")
    for name in theirs:
        if name not in ours:
            raise UserError(
                f"{where}: holds a source {name!r} that this run has not; resume with the run's own sources"
            )


def _lines(rows: Sequence[Mapping]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _generators(states: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], process: int) -> RandomState:
    """What process number `process` takes of the generators of all."""
    prefix = f"{process % len(states)}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return RandomState(**states[process % len(states)], torch=own)


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
    optimizer.state.clear()
    for key, value in saved.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        # Step counters stay where the optimizer keeps them; moments live beside their parameter.
        place = parameter.device if value.dim() or optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter][entry] = value.to(place)


def _load_schedule(
    saved: Mapping[str, Any], scheduler: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer
) -> None:
    """Go on where the saved schedule was, on this config's curve: its learning rate and length may be others."""
    rates = [
        base * curve(saved["last_epoch"]) for base, curve in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict({**saved, "base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {str(file)!r}: damaged or missing ({error}); resume from an older one") from error
