"""A process that calls reward functions for a pool, one call after the other, until it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gvpo.errors import UserError, error_line, shortened
from gvpo.rewards.outputs import Log, Output, blaming, read_output
from gvpo.rewards.workers import wire

_inside = False


def is_worker() -> bool:
    """Whether this process is one that a pool may kill."""
    return _inside


def work(connection: socket.socket, functions: Sequence[Callable[..., Any]]) -> None:
    """Answer calls until the connection ends.

    A request is a pickle, made by the pool; an answer is JSON, since who answers may have run anything.
    """
    global _inside
    _inside, me = True, os.getpid()
    while (message := wire.receive(connection)) is not None:
        number, place, name, arguments, count = pickle.loads(message)
        answer = _answer(functions[place], name, arguments, count)
        if os.getpid() != me:  # the function forked, and its child came back here
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError, AttributeError):  # the function may have closed it
                stream.flush()
        wire.send(connection, _encoded(number, answer, name))


def _encoded(number: int, answer: dict[str, Any], name: str) -> bytes:
    try:
        return wire.encode([number, answer])
    except (TypeError, ValueError, RecursionError) as error:
        line = f"reward function {name!r} gave log_extra what cannot be written ({error}): give plain values"
        return wire.encode([number, {"error": line}])


def _answer(function: Callable[..., Any], name: str, pickled: bytes, count: int) -> dict[str, Any]:
    try:
        arguments = pickle.loads(pickled)
    except Exception as error:
        line = f"reward function {name!r}: the arguments cannot be read in another process ({error_line(error)}); keep"
        return {"error": f"{line} plain values in the dataset's columns, or set reward_workers to 0"}
    try:
        return {"output": asdict(call(function, name, arguments, count))}
    except UserError as error:
        return {"error": str(error)}
    except MemoryError as error:
        return {"failure": ["memory", shortened(str(error)) or "no memory was left"]}
    except SystemExit as error:
        return {"failure": ["exit", f"the function called sys.exit({error.code!r})"]}


def call(function: Callable[..., Any], name: str, arguments: Mapping[str, Any], count: int) -> Output:
    """One call of a function, sync or async, for `count` members; arguments: all but what it logs with.

    Raises UserError for what the function raises or returns, MemoryError and SystemExit as they come.
    """
    log = Log(name)
    with blaming(name, passing=(MemoryError, SystemExit)):
        returned = function(**arguments, log_extra=log.log_extra, log_metric=log.log_metric)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
    return read_output(name, returned, log, count)


async def _awaited(call: Any) -> Any:
    return await call
