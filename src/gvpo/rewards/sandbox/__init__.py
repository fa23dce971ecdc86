"""Running a model's Python in a process of its own, with limits and, where Linux allows it, without a network.

What it is for: the mistakes of code that a model wrote, and its cheap tricks: endless loops, memory, forgotten
processes, deleted files, a download, an exit before the tests. What it is not: a boundary against an attacker who
means it. The kernel is shared, files that this user can read can be read. For that, run the trainer in a container
or a virtual machine with nothing in it worth having.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.sandbox.inside import REFUSED

MODES = "GVPO_CODE_SANDBOX"  # the environment variable that chooses between "namespaces" and "limits"
GRACE = 15.0  # seconds beyond the limit for starting and cleaning up, on a busy machine
_INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True)
class Limits:
    """What one member's code may use.

    seconds: wall time of all its tests together. cpu_seconds: of one process. memory_mb: address space of one process
    in MiB. file_mb: one file in MiB; all files together have four times that. processes: at once, all tests' together
    (with namespaces alone, as is the bound on all files).
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 64


@dataclass(frozen=True)
class Run:
    """How one run ended ("exit", "time", "processes", "killed"), its exit status (negative: a signal), its output.

    output: None where there was more than should be kept.
    """

    ended: str
    status: int | None
    output: str | None


class SandboxFailure(Exception):
    """The sandbox itself failed: there is no verdict on the code."""


def run_program(code: str, inputs: Sequence[tuple[str, int]], limits: Limits) -> list[Run]:
    """Run `code` as a program, once for each input, in order; after a run that fails no further ones are made.

    inputs: what the program reads on standard input, and how many bytes of standard output it may print.
    Raises UserError where the sandbox cannot be had on this machine, SandboxFailure where it failed this time.
    """
    report = _inside({"code": code, "inputs": list(inputs)}, limits)
    return [Run(**run) for run in report]


def passes(code: str, tests: str, limits: Limits) -> bool:
    """Whether the statements of `tests` run to their end after those of `code`, in one interpreter.

    Raises as `run_program` does.
    """
    token = secrets.token_hex(16)
    (run,) = _inside({"code": code, "tests": tests, "token": token}, limits)
    return Run(**run) == Run("exit", 0, token)


def _inside(job: dict[str, Any], limits: Limits) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="gvpo-code-", ignore_cleanup_errors=True) as folder:
        job |= {"limits": asdict(limits), "namespaces": _namespaces(), "folder": os.path.realpath(folder)}
        job["parent"] = os.getpid()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(_INSIDE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxFailure(str(error)) from None
        try:
            out, err = process.communicate(json.dumps(job).encode(), limits.seconds + GRACE)
        except subprocess.TimeoutExpired:
            raise SandboxFailure("it did not end in time") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode < 0 and not job["namespaces"]:
        return [asdict(Run("killed", None, ""))]  # the code can have done it
    return _report(process.returncode, out, err.decode(errors="replace").strip())


def _report(status: int, out: bytes, err: str) -> list[dict[str, Any]]:
    if status < 0:
        raise SandboxFailure(f"its watcher was killed ({signal.Signals(-status).name}); is memory short?")
    if status == REFUSED:
        raise UserError(
            f"code_accuracy: this machine does not let it cut the code off from the network ({err}): allow user "
            f"namespaces, or run in a container that has no network and set {MODES}=limits"
        )
    if status != 0:
        raise SandboxFailure(err.splitlines()[-1][:200] if err else f"it ended with status {status}")
    return json.loads(out)


def _namespaces() -> bool:
    if sys.platform != "linux":
        raise UserError("code_accuracy runs on Linux alone")
    mode = os.environ.get(MODES, "namespaces")
    if mode not in ("namespaces", "limits"):
        raise UserError(f"environment variable {MODES} is {mode!r}: set 'limits', or leave it out for 'namespaces'")
    return mode == "namespaces"
