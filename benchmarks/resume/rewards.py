"""A reward that draws from Python's generator, and takes its time."""

from __future__ import annotations

import os
import random
import time
from typing import Any

random.seed(f"process {os.environ.get('RANK', '0')}")


def noisy(completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """Share of the right letter, with noise; None now and then."""
    time.sleep(0.005)
    noise = [random.gauss(0, 0.1) for _ in completions]
    return [
        None if one > 0.25 else text.count(letter) / max(1, len(text)) + one
        for one, text, letter in zip(noise, completions, answer, strict=True)
    ]
