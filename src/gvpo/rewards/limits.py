"""What a call of a reward function may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: a call may take; memory: GiB that a worker and what it starts may hold; workers: None = one a core of
    this process's share."""

    seconds: float = 30.0
    memory: float = 4.0
    workers: int | None = None
