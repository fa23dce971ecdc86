"""What several tests of rewards need."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest


class NotLinear(BaseException):
    """No Exception: verifiers swallow every one of these."""


@pytest.fixture
def deadline() -> Iterator[None]:
    """Ends a scan that is quadratic, 10^10 steps and more; a linear one needs milliseconds."""

    def give_up(*_: Any) -> None:
        raise NotLinear

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
