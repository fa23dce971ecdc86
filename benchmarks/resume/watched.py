"""`gvpo`, telling which phase of a run it is in.

    WATCH=FIFO python watched.py train --config FILE ...

One line a turn: "pid N" of every process; of the main one "enter PHASE SECONDS", "leave PHASE SECONDS" and
"updated N" when update N is made.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from gvpo.cli.main import main
from gvpo.training.loop import GVPOTrainer

PHASES = {
    "resume": "_open_folder",
    "sampling": "_draw",
    "reward": "_reward",
    "reference": "_refer",
    "spill": "_remember",
    "update": "_update",
    "evaluation": "_evaluate",
    "checkpoint": "_save_checkpoint",
    "end": "_finish",
}
"""Phases by the method that is one."""


def watch(tell: Callable[[str], None]) -> None:
    """Have every phase told, when it begins and when it ends."""
    for phase, method in PHASES.items():
        setattr(GVPOTrainer, method, told(phase, getattr(GVPOTrainer, method), tell))


def told(phase: str, method: Callable[..., Any], tell: Callable[[str], None]) -> Callable[..., Any]:
    """The method, telling."""

    def telling(*args: Any, **kwargs: Any) -> Any:
        tell(f"enter {phase} {time.monotonic()}")
        result = method(*args, **kwargs)
        if phase == "update":
            tell(f"updated {result['update']}")
        tell(f"leave {phase} {time.monotonic()}")
        return result

    return telling


if __name__ == "__main__":
    pipe = os.open(os.environ["WATCH"], os.O_WRONLY)

    def tell(line: str) -> None:
        """Short lines reach a pipe whole, whoever else writes to it."""
        os.write(pipe, f"{line}\n".encode())

    tell(f"pid {os.getpid()}")
    if os.environ.get("RANK", "0") == "0":
        watch(tell)
    sys.exit(main())
