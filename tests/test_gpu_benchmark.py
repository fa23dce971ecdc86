"""The GPU benchmark on a CPU: its code runs, its table is whole, and it counts the operations that are done."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gvpo import accumulate_gradients

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_every_setting_has_a_row_with_a_figure_or_a_reason(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--repeats", "1", "--out", str(out)])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert printed == out.read_text(encoding="utf-8")
    head, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 + (3 * 3 * 2 + 2) + 1
    at = {name: place for place, name in enumerate(head)}
    for row in printed.splitlines()[-len(rows) :]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == len(head)
        assert (float(cells[at["seconds"]]) > 0) if cells[at["seconds"]] else cells[at["note"]].startswith("not run: ")
    assert sum("not run: flex_attention has no backward" in row for row in printed.splitlines()) == 6


def test_a_setting_that_fails_is_a_row_and_an_exit_code(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def sampling_run(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no | memory\nis left")

    out = tmp_path / "table.md"
    monkeypatch.setattr(gpu, "settings", lambda *_: [gpu.Setting(gpu.RANDOM, "sampling", True)])
    monkeypatch.setattr(gpu, "sampling_run", sampling_run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--out", str(out)])
    assert gpu.main() == 1
    row = out.read_text(encoding="utf-8").splitlines()[-1]
    assert row.endswith("| failed: OutOfMemoryError: no / memory |") and row in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "no CUDA device" in output.err


def test_the_operations_are_those_of_the_update(gpu: Any) -> None:
    work = gpu.Work(torch.device("cpu"), 2, 3, 8, 4, 1000, 1, True)
    model = gpu.build(gpu.Setting(gpu.RANDOM, "update", False), work)
    groups = gpu.make_groups(work, model.config.vocab_size)
    accumulate_gradients(model, groups, beta=0.1)  # whatever is measured once per model
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(model, groups, beta=0.1)
    done = sum(count for kind, count in counter.get_flop_counts()["Global"].items() if kind is torch.ops.aten.mm)
    # Norms are no matrix products; last tokens are not computed.
    norms = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 1)
    seen = [place + 1 for place in range(8)] + [8 + place + 1 for place in range(3)] * 3
    attention = 3 * 2 * sum(4 * keys * 64 for keys in seen)  # 2 groups, 4 heads of 16, one layer
    assert gpu.operations(model, work) == done + 3 * 2 * (2 * norms * (8 + 3 * 3)) + attention
