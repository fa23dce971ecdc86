"""Where a snapshot of the trainable parameters lives, and how it changes places with the policy's, one at a time.

Neither place takes more than one parameter's worth of memory on the model's device. In host memory the two are
exchanged: one copy. On the disk the policy's parameters wait in the same file beside the snapshot's, which is not
overwritten: two copies, and what the disk refuses costs no weights. The file is read and written, not mapped: a full
disk is then an error instead of a signal that kills, and pages of the file do not count as the process's memory.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gvpo.training.run_folder import disk

Storage = Literal["cpu", "disk"]

_ALIGNMENT = 64


class Snapshot(Protocol):
    """A copy of named parameters. `put` replaces one; `enter` puts one into the policy's, `leave` brings that back."""

    def put(self, name: str, value: Tensor) -> None: ...

    def enter(self, name: str, parameter: nn.Parameter) -> None: ...

    def leave(self, name: str, parameter: nn.Parameter) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """The copy's own tensors, not to be changed."""
        ...


def take_snapshot(parameters: Iterable[tuple[str, nn.Parameter]], storage: Storage, folder: Path | None) -> Snapshot:
    """A copy of these parameters as they are now. folder: where a file goes, None = the system's temporary folder.

    Raises UserError if the disk is full.
    """
    named = dict(parameters)
    return MemorySnapshot(named) if storage == "cpu" else FileSnapshot(named, folder)


@contextmanager
def lent(snapshot: Snapshot, parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """The snapshot's values in these parameters inside the block, their own afterwards, whatever happens."""
    entered: list[tuple[str, nn.Parameter]] = []
    try:
        for name, parameter in parameters:
            snapshot.enter(name, parameter)
            entered.append((name, parameter))
        yield
    finally:
        for name, parameter in entered:
            snapshot.leave(name, parameter)


class MemorySnapshot:
    """In host memory."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._tensors = {name: _host_copy(parameter) for name, parameter in parameters.items()}

    def put(self, name: str, value: Tensor) -> None:
        self._tensors[name].copy_(value.detach())

    @torch.no_grad()
    def enter(self, name: str, parameter: nn.Parameter) -> None:
        held = parameter.detach().clone()
        parameter.copy_(self._tensors[name])
        self._tensors[name].copy_(held)

    leave = enter

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)


class FileSnapshot:
    """In a file without a name, which goes when the process does, however it ends."""

    def __init__(self, parameters: dict[str, nn.Parameter], folder: Path | None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._size = 0
        for name, parameter in parameters.items():
            self._places[name] = (self._size, parameter.shape, parameter.dtype)
            self._size += math.ceil(parameter.nbytes / _ALIGNMENT) * _ALIGNMENT
        with disk(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for name, parameter in parameters.items():
            # The policy's place too, so that a disk that is too small stops the run before it begins.
            for start in (0, self._size):
                self._write(name, parameter, start)

    def put(self, name: str, value: Tensor) -> None:
        self._write(name, value, 0)

    @torch.no_grad()
    def enter(self, name: str, parameter: nn.Parameter) -> None:
        self._write(name, parameter, self._size)
        parameter.copy_(self._read(name, 0))

    @torch.no_grad()
    def leave(self, name: str, parameter: nn.Parameter) -> None:
        parameter.copy_(self._read(name, self._size))

    def tensors(self) -> dict[str, Tensor]:
        mapped = torch.frombuffer(mmap.mmap(self._file.fileno(), self._size), dtype=torch.uint8)
        return {
            name: mapped[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (offset, shape, dtype) in self._places.items()
        }

    def _write(self, name: str, value: Tensor, start: int) -> None:
        offset, _, dtype = self._places[name]
        with disk(self._folder):
            self._file.seek(start + offset)
            self._file.write(_bytes(value.detach().to("cpu", dtype)))
            self._file.flush()

    def _read(self, name: str, start: int) -> Tensor:
        offset, shape, dtype = self._places[name]
        value = torch.empty(shape, dtype=dtype)
        with disk(self._folder):
            self._file.seek(start + offset)
            count = self._file.readinto(_bytes(value))
        assert count == value.nbytes, f"{name}: {count} bytes of {value.nbytes}"
        return value


def _host_copy(parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter, device="cpu", requires_grad=False).copy_(parameter.detach())


def _bytes(value: Tensor) -> memoryview:
    flat: Any = value.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)
