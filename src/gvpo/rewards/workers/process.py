"""The parent's end of the processes that call reward functions: the server that forks them, and a worker each."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil

from gvpo.errors import UserError
from gvpo.rewards.limits import Limits
from gvpo.rewards.outputs import Failure
from gvpo.rewards.workers import wire

IMPORT_SECONDS = 120.0
"""How long the modules of the functions may take to import."""

MOST_OUTPUT = 2**20
"""Bytes that one call, or the import of all modules, may print."""

SHOWN_OUTPUT = 2**14
"""Bytes of it that are passed on to standard error."""

_LOOK = 0.02
_LOOK_AT_CHILDREN = 0.5
_GIB = 2**30
_DYING = 1.0
_CLEARING_UP = 5.0


class Failed(Exception):
    """A call that brought no answer, and cost its worker. failure None: how the process ended is not known yet."""

    def __init__(self, failure: Failure | None) -> None:
        super().__init__(str(failure))
        self.failure = failure


class ForkServer:
    """A process that has imported functions, and forks workers that call them; usable from any thread.

    functions: name and parameters of each, as `fork_server` describes them.
    Raises UserError where a module or function is missing, or the import fails, hangs, exits or prints without end.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        output, writing = os.pipe()
        with theirs:
            self._process = _start_server(entries, theirs.fileno(), writing)
        os.close(writing)
        try:
            self.functions = self._imported(entries, output)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(output)

    def _imported(self, entries: Sequence[str], output: int) -> list[tuple[str, Any]]:
        """Name and parameters of each function, once all modules are imported."""
        try:
            reply = wire.decode(_answer(self._control, output, IMPORT_SECONDS, None))
            described = [(one["name"], one["parameters"]) for one in reply.get("functions", ())]
        except (Failed, ValueError, TypeError, KeyError, AttributeError) as error:
            self._kill(after=0.0 if isinstance(error, Failed) and error.failure else _DYING)
            failure = error.failure if isinstance(error, Failed) else _GARBLED
            raise UserError(
                f"reward_funcs: importing {', '.join(map(repr, entries))}: "
                f"{failure.detail if failure else _ending(self._process.returncode)}: fix the module, or have the "
                "function do this when it is called"
            ) from error
        if "error" in reply:
            raise UserError(reply["error"])
        return described

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def fork(self, limits: Limits) -> Worker:
        """A new worker."""
        connection, theirs = socket.socketpair()
        output, writing = os.pipe()
        try:
            pid = self._ask(b"F", 0, [theirs.fileno(), writing])
        except UserError:
            connection.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(writing)
        return Worker(pid, connection, output, limits)

    def end(self, worker: Worker, *, dying: bool = False) -> Failure:
        """Kill a worker and what it started. Returns how it ended; dying: by itself, which may take a moment."""
        worker.close()
        status = self._ask(b"W" if dying else b"K", worker.pid, [])
        return Failure("crash" if os.WIFSIGNALED(status) else "exit", _ending(os.waitstatus_to_exitcode(status)))

    def close(self) -> None:
        """End the server, and with it everything."""
        with contextlib.suppress(OSError):
            # A process that was forked from this one may hold a copy, which closing would leave open.
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        self._kill(after=_CLEARING_UP)

    def _kill(self, after: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, letter: bytes, number: int, fds: list[int]) -> int:
        try:
            with self._lock:
                socket.send_fds(self._control, [wire.REQUEST.pack(letter, number)], fds)
                reply = self._control.recv(wire.REPLY.size, socket.MSG_WAITALL)
        except OSError:
            reply = b""
        if len(reply) < wire.REPLY.size:
            raise UserError(
                "the process that reward functions are called from has ended, of itself or for want of memory; start "
                "again, with fewer reward_workers where memory was short"
            )
        return wire.REPLY.unpack(reply)[0]


class Worker:
    """One process, which answers one call at a time."""

    def __init__(self, pid: int, connection: socket.socket, output: int, limits: Limits) -> None:
        self.pid, self._connection, self._output, self._limits = pid, connection, output, limits
        self._numbers = itertools.count()
        self._settled: float | None = None
        connection.settimeout(limits.seconds)

    def exchange(self, place: int, name: str, arguments: dict[str, Any], count: int) -> dict[str, Any]:
        """The answer to a call of function number `place`, as `worker` gives it.

        Raises Failed where there is none, and UserError for arguments that cannot be pickled.
        """
        number = next(self._numbers)
        # The arguments apart: what cannot be read there must not take the rest with it.
        request = pickle.dumps((number, place, name, _pickled(arguments, name), count))
        try:
            wire.send(self._connection, request)
            watch = _MemoryWatch(self.pid, self._limits.memory)
            echo, answer = wire.decode(_answer(self._connection, self._output, self._limits.seconds, watch))
            if echo != number or not answer.keys() & {"output", "error", "failure"}:
                raise ValueError
        except TimeoutError:
            raise Failed(_hang(self._limits.seconds)) from None
        except OSError:
            raise Failed(None) from None
        except (ValueError, TypeError, AttributeError):
            raise Failed(_GARBLED) from None
        return answer

    @property
    def heaped(self) -> float:
        """GiB that it holds now beyond what it held after its first answer."""
        held = _memory(self.pid)
        self._settled = held if self._settled is None else self._settled
        return held - self._settled

    def close(self) -> None:
        """Close this end."""
        self._connection.close()
        os.close(self._output)


class _MemoryWatch:
    """Looks, now and then, at the memory of a worker and of what it has started. limit: GiB."""

    def __init__(self, pid: int, limit: float) -> None:
        self._pid, self._limit = pid, limit
        self._children_at = time.monotonic() + _LOOK_AT_CHILDREN

    def look(self) -> None:
        held = _memory(self._pid)
        if held <= self._limit and time.monotonic() >= self._children_at:
            self._children_at = time.monotonic() + _LOOK_AT_CHILDREN
            with contextlib.suppress(psutil.NoSuchProcess):
                held += sum(_memory(child.pid) for child in psutil.Process(self._pid).children(recursive=True))
        if held > self._limit:
            raise Failed(Failure("memory", f"the process held more than {self._limit:g} GiB"))


def _start_server(entries: Sequence[str], control: int, output: int) -> subprocess.Popen[bytes]:
    # The path comes first: what this process imports from, that one must.
    start = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from gvpo.rewards.workers.fork_server import main; main(int(sys.argv[2]), sys.argv[3:])"
    )
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            start,
            json.dumps([one for one in sys.path if isinstance(one, str)]),
            str(control),
            *entries,
        ],
        pass_fds=[control],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _answer(connection: socket.socket, output: int, seconds: float, watch: _MemoryWatch | None) -> bytes:
    """The next message of a process, what it prints meanwhile passed on. Raises Failed where none comes in time."""
    deadline, printed, wanted, parts = time.monotonic() + seconds, _Printed(output), wire.HEADER.size, bytearray()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(output, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(1000 * (min(left, _LOOK) if watch else left)):
            if fd == output:
                if not printed.read():
                    poll.unregister(output)
                continue
            part = connection.recv(min(wanted - len(parts), 2**20))
            if not part:
                raise Failed(None)
            parts += part
            if len(parts) == wanted == wire.HEADER.size:
                wanted += _size(bytes(parts))
            elif len(parts) == wanted:
                printed.read_rest()
                return bytes(parts[wire.HEADER.size :])
        if watch is not None:
            watch.look()
    raise Failed(_hang(seconds))


def _size(header: bytes) -> int:
    (size,) = wire.HEADER.unpack(header)
    if not 0 < size <= wire.LARGEST_REPLY:
        raise Failed(_GARBLED)
    return size


class _Printed:
    """What a call prints: the beginning is passed on, all is counted."""

    def __init__(self, output: int) -> None:
        self._output, self._count = output, 0

    def read_rest(self) -> None:
        """What was printed before the answer and is not read yet: as much as a pipe holds."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if poll.poll(0):
            self.read()

    def read(self) -> bool:
        """Take what is there; False at the end. Raises Failed for more than `MOST_OUTPUT`."""
        text = os.read(self._output, 2**16)
        if shown := text[: max(0, SHOWN_OUTPUT - self._count)]:
            # Nobody may be there to read it, which is not the function's fault.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                cut = self._count + len(text) > SHOWN_OUTPUT
                sys.stderr.write(shown.decode(errors="replace") + " ...\n" * cut)
                sys.stderr.flush()
        self._count += len(text)
        if self._count > MOST_OUTPUT:
            raise Failed(Failure("output", f"it printed more than {MOST_OUTPUT:,} bytes"))
        return bool(text)


def _pickled(request: Any, name: str) -> bytes:
    try:
        return pickle.dumps(request)
    except Exception as error:
        raise UserError(
            f"reward function {name!r}: the arguments cannot be sent to another process ({error}); keep plain values "
            "in the dataset's columns, or set reward_workers to 0"
        ) from error


_GARBLED = Failure("garbled", "what came back was not an answer")


def _hang(seconds: float) -> Failure:
    return Failure("hang", f"no answer within {seconds:g} s")


def _ending(code: int) -> str:
    """An exit code in words; below 0 the signal that ended the process."""
    if code >= 0:
        return f"the process ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process was ended by signal {-code}"


def _memory(pid: int) -> float:
    """GiB that a process holds; 0 for one that is gone."""
    try:
        return psutil.Process(pid).memory_info().rss / _GIB
    except psutil.Error:
        return 0.0
