"""Messages between a pool and its processes: a length, then bytes."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("!Q")
REQUEST = struct.Struct("!cq")
REPLY = struct.Struct("!q")
"""To the server that forks workers, and back: see `fork_server`."""

LARGEST_REPLY = 64 * 2**20
"""Bytes. What claims to be longer was not written by a worker."""


def send(connection: socket.socket, message: bytes) -> None:
    """Write one message."""
    connection.sendall(HEADER.pack(len(message)) + message)


def receive(connection: socket.socket) -> bytes | None:
    """Read one message; None at the end of the connection."""
    header = _exactly(connection, HEADER.size)
    return None if header is None else _exactly(connection, HEADER.unpack(header)[0])


def encode(value: Any) -> bytes:
    """JSON with NaN and infinity; what JSON has no form for is written as a string."""
    return json.dumps(value, default=str).encode()


def decode(message: bytes) -> Any:
    """What `encode` wrote. Raises ValueError."""
    return json.loads(message)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 2**20))
        if not part:
            return None
        parts += part
    return bytes(parts)
