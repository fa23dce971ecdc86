"""SIGTERM: a run that is told to stop saves a checkpoint and exits, within a bounded time.

One process: the time of one update and the write of a checkpoint. Drawing, rewards and evaluation, which change nothing
that cannot be put back, are left at once; before the reference scoring of each update's groups, and after each update,
the run looks whether it was told. Several processes: after the next update, on which all of them agree, after the
evaluation that they are in, or while they wait for groups from files; so within a rollout, an update and a write. Not
covered: a call into compiled code, which Python does not leave, and threads of a reward function, which Python waits
for when it exits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from gvpo.training.processes import OneProcess

EXIT_CODE = 128 + signal.SIGTERM
"""143, what a shell says of a process that SIGTERM ended."""


class Stopped(SystemExit):
    """What `train` raises when SIGTERM has stopped it after `update`; `checkpoint` is where it goes on from."""

    def __init__(self, update: int, checkpoint: Path) -> None:
        super().__init__(EXIT_CODE)
        self.update = update
        self.checkpoint = checkpoint


class StopNow(BaseException):
    """On the way from where SIGTERM found the run to where the checkpoint is saved.

    Neither an Exception nor a SystemExit, both of which are caught around reward functions.
    """


class Sigterm:
    """Whether this process was told to stop. A context manager: it listens inside the block, in the main thread only.

    heeded: whether the run stops for it at all. at_once: whether it may leave an interruptible block in the middle.
    """

    def __init__(self, heeded: bool = False, *, at_once: bool = False) -> None:
        self.requested = False
        self._heeded = heeded
        self._at_once = heeded and at_once
        self._interruptible = False
        self._listening = False
        self._before: Any = None

    def __enter__(self) -> Sigterm:
        self._listening = self._heeded and threading.current_thread() is threading.main_thread()
        if self._listening:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening:
            # None is a handler that was not installed from Python, and cannot be from here.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that changes nothing but what a rollback puts back, and that StopNow may leave at any point."""
        # Set first: a signal between the two would otherwise wait for the end of the block.
        self._interruptible = self._at_once
        try:
            self.look()
            yield
        finally:
            self._interruptible = False
        # What was called may have caught StopNow.
        self.look()

    def look(self) -> None:
        """A place where a run of one process stops, if it was told to."""
        if self.requested and self._at_once:
            raise StopNow

    def look_together(self, processes: OneProcess) -> None:
        """A place where all processes stop, if one of them was told to."""
        if self._heeded and processes.most(int(self.requested)):
            raise StopNow

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopNow
