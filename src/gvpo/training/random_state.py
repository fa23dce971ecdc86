"""The random generators that a process keeps for everybody: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where one process's generators are. python, numpy: JSON; torch: bytes by generator, "torch" and "cuda/N"."""

    python: Any
    numpy: dict[str, Any]
    torch: dict[str, Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """This process's, as they are."""
        states = {"torch": torch.get_rng_state()}
        for index in range(torch.cuda.device_count()):
            states[f"cuda/{index}"] = torch.cuda.get_rng_state(index)
        return cls(random.getstate(), _numpy_state(), states)

    def restore(self) -> None:
        """Put this process's generators back to here; those of CUDA devices that were not there then stay."""
        version, numbers, gauss = self.python
        random.setstate((version, tuple(numbers), gauss))
        key = np.array(self.numpy["state"]["key"], dtype=np.uint32)
        np.random.set_state(self.numpy | {"state": {"key": key, "pos": self.numpy["state"]["pos"]}})
        torch.set_rng_state(self.torch["torch"])
        for index in range(torch.cuda.device_count()):
            if f"cuda/{index}" in self.torch:
                torch.cuda.set_rng_state(self.torch[f"cuda/{index}"], index)


def _numpy_state() -> dict[str, Any]:
    state: dict[str, Any] = np.random.get_state(legacy=False)  # pyright: ignore[reportAssignmentType]
    return state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}}
