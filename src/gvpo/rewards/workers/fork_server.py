"""The process that imports reward functions once, and forks, kills and buries the workers that call them.

It has one thread, so that a fork is safe, and adopts whatever its workers leave behind, so that nothing outlives them.
A request of the pool is a letter and a number: F with two file descriptors, the ends of a worker's connection and of
its output, is answered by the worker's pid; K and a pid by its wait status, once it is killed; W is K for a worker that
is about to end by itself, whose own status is waited for. At the end of the connection all processes go.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import psutil

from gvpo.errors import UserError
from gvpo.rewards.resolve import resolve_rewards
from gvpo.rewards.workers import wire
from gvpo.rewards.workers.worker import work

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_LOOK_FOR_PARENT = 1.0
_DYING = 0.2


def main(control_fd: int, entries: Sequence[str]) -> None:
    """Import the functions that `entries` name, say what they take or what is wrong with them, then serve."""
    parent, me = os.getppid(), os.getpid()
    control = socket.socket(fileno=control_fd)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        functions = [found.function for found in resolve_rewards(entries, pool=None)]
        reply: dict[str, Any] = {"functions": [_described(function) for function in functions]}
    except UserError as error:
        functions, reply = [], {"error": str(error)}
    if os.getpid() != me:  # a module forked on import, and its child came back here
        os._exit(0)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    wire.send(control, wire.encode(reply))
    _silence()
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared with the workers
    _Server(control, functions, parent).serve()


class _Server:
    def __init__(self, control: socket.socket, functions: Sequence[Callable[..., Any]], parent: int) -> None:
        self._control, self._functions, self._parent = control, functions, parent
        self._workers: set[int] = set()
        # What a module started on import is there for all workers.
        self._kept = {child.pid for child in psutil.Process().children()}

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, self._release)
        # Schedulers tell every process of a job to end; this one ends with the run, which may have to save first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for letter, number, fds in self._requests():
            answer = self._fork(*fds) if letter == b"F" else self._end(number, patience=_DYING * (letter == b"W"))
            with contextlib.suppress(BrokenPipeError):
                self._control.sendall(wire.REPLY.pack(answer))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._kept.clear()
        for pid in list(self._workers):
            self._end(pid)
        self._bury_strays()

    def _requests(self) -> Iterator[tuple[bytes, int, list[int]]]:
        self._control.settimeout(_LOOK_FOR_PARENT)
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, wire.REQUEST.size, 2)
            except TimeoutError:
                # The pool's end may live on in another process that was forked from its own.
                if os.getppid() != self._parent:
                    return
                continue
            if len(message) < wire.REQUEST.size:
                return
            yield *wire.REQUEST.unpack(message), list(fds)

    def _fork(self, connection: int, output: int) -> int:
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            self._be_worker(server, connection, output)
        self._workers.add(pid)
        os.close(connection)
        os.close(output)
        return pid

    def _be_worker(self, server: int, connection: int, output: int) -> NoReturn:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(_SET_CHILD_SUBREAPER, 1)
            if os.getppid() == server:
                self._control.close()
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.close(output)
                work(socket.socket(fileno=connection), self._functions)
        finally:
            os._exit(70)

    def _release(self, *_: object) -> None:
        """End what shares a dead worker's connection, so that the pool sees that it is dead; its status waits."""
        for pid in list(self._workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    _kill_group(pid)

    def _end(self, pid: int, patience: float = 0.0) -> int:
        """Kill a worker and all that it started. Returns its wait status, of an earlier death if it had one."""
        deadline = time.monotonic() + patience
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        _kill_group(pid)
        _, status = os.waitpid(pid, 0)
        self._workers.discard(pid)
        self._bury_strays()
        return status

    def _bury_strays(self) -> None:
        """Kill the children that are nobody's worker: what dead workers left behind was given to this process."""
        while strays := {child.pid for child in psutil.Process().children()} - self._workers - self._kept:
            for pid in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _described(function: Callable[..., Any]) -> dict[str, Any]:
    """Name and parameters (name, kind, whether it has a default) of a function; no parameters where it tells none."""
    from gvpo.rewards.resolve import own_name

    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return {"name": own_name(function), "parameters": None}
    told = [(one.name, int(one.kind), one.default is not one.empty) for one in parameters]
    return {"name": own_name(function), "parameters": told}


def _silence() -> None:
    """The output of this process goes nowhere; its workers have one each."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Linux alone has it; elsewhere what calls setsid outlives its worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
