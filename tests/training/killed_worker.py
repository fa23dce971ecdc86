"""Runs that are killed (SIGKILL), each in a process of its own, and gone on with.

killed_worker.py FOLDER leaves in FOLDER the run `whole` and, for every kill, the run that was killed there and resumed,
and `told.json`: of each its wait status, the checkpoints it left, and hidden names before and after.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from interruptions import POINTS, strike, trainer_in

from gvpo.training.run_folder import checkpoints, leftovers

OPTIONS = {"save_steps": 2, "save_total_limit": 1}

KILLS = {
    "update": ("step", 4),
    "row": ("rows", 8),
    "completions": ("completions", 4),
    # Five tensor files a checkpoint: within the second.
    "checkpoint": ("checkpoint", 6),
    "its state": ("its state", 2),
    "pruning": ("half removed", 1),
}
"""The point and the call of each kill."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, point: str, call: int) -> int:
    """The wait status of a process that trains in this folder and is killed there."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        trainer = trainer_in(folder, **OPTIONS)
        if point == "half removed":
            strike_within_a_removal()
        else:
            strike(POINTS[point](trainer), call, kill)
        trainer.train()
    finally:
        os._exit(3)


def strike_within_a_removal() -> None:
    """Die when some of a checkpoint's files are gone."""
    from gvpo.training import run_folder

    def half(folder: Path, *args: Any, **kwargs: Any) -> None:
        (folder / "optimizer.safetensors").unlink(missing_ok=True)
        if any(folder.glob("*.safetensors")):
            kill()

    run_folder.shutil.rmtree = half


def main(folder: Path) -> None:
    """Every kill."""
    told: dict[str, Any] = {}
    # Forked first: a process that has computed may hold threads, which a fork does not take along.
    for name, (point, call) in KILLS.items():
        status = killed(folder / name, point, call)
        left = [entry.name for entry in checkpoints(folder / name)]
        told[name] = {"status": status, "checkpoints": left, "hidden": [e.name for e in leftovers(folder / name)]}
    trainer_in(folder / "whole", **OPTIONS).train()
    for name, one in told.items():
        trainer_in(folder / name, seed=5, **OPTIONS).train(resume_from_checkpoint=True)
        one["hidden at the end"] = [entry.name for entry in leftovers(folder / name)]
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
