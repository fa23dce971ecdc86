"""A reward function that is found by its name, and takes its process down now and then."""

from __future__ import annotations

import os
from typing import Any


def first_or_crash(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The first token; where it is a multiple of five, the process aborts."""
    if any(ids[0] % 5 == 0 for ids in completion_ids):
        os.abort()
    return [float(ids[0]) for ids in completion_ids]
