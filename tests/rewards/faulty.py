"""Reward functions that do what a completion tells them: the worst that a verifier can meet, and the right answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any


def obedient(*, completions: list[str], **columns: Any) -> list[float]:
    """The number after "say", after doing what stands before it."""
    values = []
    for text in completions:
        verb, _, number = text.rpartition(" ")
        MISDEEDS.get(verb, lambda: None)()
        values.append(float(number))
    return values


def _hold_memory() -> None:
    held = b"x" * 300_000_000
    time.sleep(3600)
    del held


def _print_without_end() -> None:
    while True:
        print("x" * 10_000)


def _write_garbage() -> None:
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\xff" * 64)


def _leave_a_daemon() -> None:
    """A grandchild in a session of its own that outlives whoever started it."""
    subprocess.Popen([sys.executable, "-c", _DAEMON], start_new_session=True)


def _close_everything() -> None:
    os.closerange(3, 64)


_DAEMON = "import subprocess, sys; subprocess.Popen(['sleep', '3600.5'], start_new_session=True)"

MISDEEDS = {
    "hang": lambda: time.sleep(3600),
    "hang deaf": lambda: [signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(3600)],
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda: os.abort(),
    "exit": lambda: sys.exit(3),
    "exit at once": lambda: os._exit(0),
    "memory": _hold_memory,
    "print": _print_without_end,
    "garbage": _write_garbage,
    "close": _close_everything,
    "daemon and exit": lambda: [_leave_a_daemon(), time.sleep(0.2), os._exit(4)],
    # These are no faults: the answer comes, and nothing may be left behind.
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 0.1),  # the worker dies of it, after its answer
    "fork": lambda: os.fork(),
    "daemon": _leave_a_daemon,
    "thread": lambda: threading.Thread(target=time.sleep, args=(3600,)).start(),
    "print a little": lambda: print("seen"),
}

CAUSE = {
    "hang": "hang",
    "hang deaf": "hang",
    "crash": "crash",
    "abort": "crash",
    "exit": "exit",
    "exit at once": "exit",
    "memory": "memory",
    "print": "output",
    "garbage": "garbled",
    "close": "exit",
    "daemon and exit": "exit",
}
"""The cause that each misdeed is counted under."""


def lonely(*, completions: list[str], **columns: Any) -> list[float]:
    """How many members came in one call."""
    return [float(len(completions))] * len(completions)


def logging(*, completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[float | None]:
    log_extra("text", [text.upper() for text in completions])
    log_metric("members", len(completions))
    return [None if text == "none" else 1.0 for text in completions]


async def waiting(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def told(*, completions: list[str], prompts: list[str], answer: list[int], trainer_state: Any, **columns: Any) -> Any:
    return [
        float(f"{len(prompt)}{number}{trainer_state['step']}") for prompt, number in zip(prompts, answer, strict=True)
    ]


def raising(*, completions: list[str], **columns: Any) -> Any:
    raise RuntimeError("no judge\nat home")


def short(*, completions: list[str], **columns: Any) -> Any:
    return []


def wrong(*, completions: list[str], **columns: Any) -> Any:
    return [float("nan") if text == "nan" else "three" for text in completions]


def slow(*, completions: list[str], **columns: Any) -> list[float]:
    time.sleep(0.2)
    return [time.monotonic() for _ in completions]


def pid(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(os.getpid()) for _ in completions]
