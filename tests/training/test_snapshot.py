"""Where a snapshot lives: the values come back to the bit, a file leaves nothing behind, a full disk is one line."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import first_token, offline_groups, prompts, run, same_weights, settings, tiny_model, weights

from gvpo.errors import UserError
from gvpo.training import snapshot as snapshot_module
from gvpo.training.loop import GVPOTrainer
from gvpo.training.snapshot import FileSnapshot, MemorySnapshot, Storage, lent, take_snapshot


class Odd(nn.Module):
    """Parameters of every kind: a number, none at all, half precision, a transposed matrix, double precision."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.number = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.randn(0, 3))
        self.short = nn.Parameter(torch.randn(7).bfloat16())
        self.turned = nn.Parameter(torch.randn(5, 3).t())
        self.long = nn.Parameter(torch.randn(3, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize("storage", ["cpu", "disk"])
def test_values_are_lent_and_come_back(tmp_path: Path, storage: Storage) -> None:
    model, other = Odd(0), Odd(1)
    snapshot = take_snapshot(model.named_parameters(), storage, tmp_path / "new")
    start = weights(model)
    assert same_weights(snapshot.tensors(), start)
    for name, value in other.named_parameters():
        snapshot.put(name, value)
    for _ in range(2):
        assert same_weights(snapshot.tensors(), weights(other))
        with pytest.raises(KeyboardInterrupt), lent(snapshot, model.named_parameters()):
            assert same_weights(weights(model), weights(other))
            raise KeyboardInterrupt
        assert same_weights(weights(model), start)
        with torch.no_grad():
            model.turned.add_(1)
        start = weights(model)


def test_a_file_holds_its_values_while_it_is_lent_and_has_no_name(tmp_path: Path) -> None:
    model, other = Odd(0), Odd(1)
    snapshot = FileSnapshot(dict(other.named_parameters()), tmp_path)
    with lent(snapshot, model.named_parameters()):
        assert same_weights(snapshot.tensors(), weights(other)) and list(tmp_path.iterdir()) == []


def test_a_run_folder_holds_what_it_always_does(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def watching(**kwargs: Any) -> list[float]:
        seen.append({entry.name for entry in tmp_path.iterdir()})
        return first_token(**kwargs)

    options = {"reference": "initial", "reference_storage": "disk", "output_dir": str(tmp_path)}
    trainer = run(tiny_model(), prompts(), watching, **options)
    assert isinstance(trainer.reference._snapshot, FileSnapshot)
    assert trainer.reference._snapshot._folder == tmp_path
    assert seen == [{"config.yaml"}, {"config.yaml", "completions", "metrics.jsonl", "timings.jsonl"}]
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny_model(), prompts(), watching, **options)
    assert isinstance(run(tiny_model(), prompts(), first_token, reference=2).reference._snapshot, MemorySnapshot)


class SmallDisk:
    """An open file on a disk with so many bytes left."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: memoryview) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def small_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    real = tempfile.TemporaryFile
    monkeypatch.setattr(snapshot_module.tempfile, "TemporaryFile", lambda **where: SmallDisk(real(**where), room))


SIZE = sum(p.nbytes for p in tiny_model().parameters())


@pytest.mark.parametrize("copies", [0.5, 1.5])
def test_a_disk_too_small_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: float
) -> None:
    small_disk(monkeypatch, int(copies * SIZE))
    called: list[int] = []
    config = settings(reference="initial", reference_storage="disk", output_dir=str(tmp_path))
    model = tiny_model()
    trainer = GVPOTrainer(model, prompts(), lambda **kwargs: called.append(1), config=config)
    with pytest.raises(UserError, match="no space left on the disk") as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not called and list(tmp_path.iterdir()) == [] and same_weights(weights(model), weights(tiny_model()))


@pytest.mark.parametrize("copies", [2.1, 2.9])
def test_a_disk_that_fills_up_later_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: float
) -> None:
    # A file system that writes anew instead of over the old needs room for what it has room for already.
    small_disk(monkeypatch, int(copies * SIZE))
    model = tiny_model()
    options = {"reference": "initial", "reference_storage": "disk", "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="no space left on the disk"):
        run(model, offline_groups(), **options)
    assert same_weights(weights(model), weights(tiny_model()))
