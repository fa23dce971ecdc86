"""What a run asks of the process it runs in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from gvpo.models.modes import run_device

FAULTS = """
import resource, torch
from gvpo.training.devices import keep_freed_memory

def pages_for_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)  # 40 MiB: 10,240 pages of 4 KiB, more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1).exp_()
before = min(pages_for_a_tensor() for _ in range(8))
keep_freed_memory()
# Small objects settle now and then in what was freed, and the next tensor is mapped anew.
print(before, min(pages_for_a_tensor() for _ in range(24)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10, "every tensor had its pages mapped anew"


@pytest.mark.parametrize(("found", "expected"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")])
def test_a_run_goes_where_float64_is(monkeypatch: pytest.MonkeyPatch, found: str | None, expected: str) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(found or "cpu"))
    assert run_device().type == expected
