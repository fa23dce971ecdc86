"""What is measured: cases of work, the systems that do it, and their settings. Plain data, nothing heavy imported."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

SEED = 7
LENGTHS_SEED = 493
"""One with which the completions of `main` have 25 tokens on average."""


@dataclass(frozen=True)
class Llama:
    """A random Llama: heads of 64, a third as many for keys and values, feed-forward three times as wide; head tied."""

    hidden: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Case:
    """One step's work: `prompts` of `prompt_tokens`, `k` completions each, of at most `max_tokens`.

    model: SmolLM2-135M where None. token_budget: this trainer's. value: what a growth series varies.
    """

    name: str
    prompts: int = 8
    k: int = 8
    prompt_tokens: int = 46
    max_tokens: int = 32
    token_budget: int | None = 1024
    processes: int = 1
    model: Llama | None = None
    value: int = 0

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens of every completion, prompt by prompt: evenly drawn from 18/32 of the most on."""
        numbers = random.Random(LENGTHS_SEED)
        shortest = round(self.max_tokens * 18 / 32)
        return [[numbers.randint(shortest, self.max_tokens) for _ in range(self.k)] for _ in range(self.prompts)]

    @property
    def completion_tokens(self) -> int:
        """Of one step."""
        return sum(map(sum, self.lengths))

    @property
    def padded_tokens(self) -> int:
        """Positions of one step with every completion padded beside its own copy of the prompt."""
        return self.prompts * self.k * (self.prompt_tokens + max(map(max, self.lengths)))


MAIN = Case("main")
LONG = Case("long", prompts=2, k=16, prompt_tokens=512)
"""Few prompts, as every one takes TRL more than a minute."""

_FEW = Case("", prompts=2, k=4)
GROWTH: dict[str, list[Case]] = {
    "k": [replace(_FEW, prompt_tokens=128, k=n) for n in (4, 8, 16, 32, 64)],
    # In both, one sequence must fit the budget.
    "prompt": [replace(_FEW, prompt_tokens=n, token_budget=4096) for n in (32, 128, 512, 1024, 2048)],
    "completion": [replace(_FEW, max_tokens=n, token_budget=2048) for n in (32, 128, 512, 1024)],
    "groups": [replace(_FEW, prompts=n) for n in (2, 4, 8, 16, 32)],
    "vocabulary": [replace(_FEW, k=8, model=Llama(384, 8, n)) for n in (8_192, 32_768, 131_072)],
    "size": [replace(_FEW, k=8, model=Llama(hidden, layers, 16_384)) for hidden, layers in ((384, 8), (960, 12))],
    "budget": [replace(_FEW, prompts=8, prompt_tokens=128, token_budget=n) for n in (256, 512, 1024, 2048, 4096)],
    "processes": [replace(MAIN, processes=n) for n in (1, 2)],
}
_VARIED = {
    "k": lambda case: case.k,
    "prompt": lambda case: case.prompt_tokens,
    "completion": lambda case: case.max_tokens,
    "groups": lambda case: case.prompts,
    "vocabulary": lambda case: case.model.vocabulary,
    "size": lambda case: case.model.hidden,
    "budget": lambda case: case.token_budget,
    "processes": lambda case: case.processes,
}
GROWTH = {
    series: [replace(case, name=f"{series} {_VARIED[series](case)}", value=_VARIED[series](case)) for case in cases]
    for series, cases in GROWTH.items()
}
CASES = {case.name: case for case in [MAIN, LONG, *chain(*GROWTH.values())]}


@dataclass(frozen=True)
class Trl:
    """How TRL's trainer is set. weights: their dtype, and then the optimizer state's. keeps_memory: as this trainer's
    process does, which TRL's does not by itself.
    """

    weights: str
    autocast: bool
    micro_batch: int
    compiled: bool = False
    keeps_memory: bool = False

    @property
    def precision(self) -> str:
        """What it is compared with."""
        return "bf16" if self.autocast or self.weights == "bfloat16" else "float32"


OURS: dict[str, dict[str, Any]] = {
    "float32": {"rollout_dtype": "float32"},
    "float32, bf16 rollouts": {"rollout_dtype": "bfloat16"},
    "bf16": {"bf16": True},
    "float32, 256 positions": {"rollout_dtype": "float32", "token_budget": 256},
    "bf16, 512 positions": {"bf16": True, "token_budget": 512},
    "float32, compiled": {"rollout_dtype": "float32", "torch_compile": True},
    "bf16, compiled, 2048 positions": {"bf16": True, "torch_compile": True, "token_budget": 2048},
}
"""This trainer's settings, two for little memory, two for speed. Weights and optimizer state are float32 in all."""

PRECISIONS = ("float32", "float32, bf16 rollouts", "bf16")
"""Those of them that `long` is measured in."""

PLAIN = ("float32", "bf16")
"""The plain loop's: bf16 is autocast around both generation and forward."""

TRL = {
    "float32, 2": Trl("float32", False, 2),
    "float32, 4": Trl("float32", False, 4),
    "float32, 8": Trl("float32", False, 8),
    "float32, 16": Trl("float32", False, 16),
    "autocast, 8": Trl("float32", True, 8),
    "bf16 weights, 4": Trl("bfloat16", False, 4),
    "bf16 weights, 8": Trl("bfloat16", False, 8),
    "bf16 weights, 16": Trl("bfloat16", False, 16),
    "bf16 weights and autocast, 8": Trl("bfloat16", True, 8),
    "float32, 4, freed memory kept": Trl("float32", False, 4, keeps_memory=True),
    "bf16 weights, 4, freed memory kept": Trl("bfloat16", False, 4, keeps_memory=True),
    "bf16 weights, 8, freed memory kept": Trl("bfloat16", False, 8, keeps_memory=True),
    "bf16 weights, 8, compiled": Trl("bfloat16", False, 8, compiled=True),
}
"""TRL's settings, with the completions in one micro-batch."""

SLOW_TRL = ("float32, 16", "autocast, 8")
"""In `main` 1.7 and 1.4 times slower than the fastest of their precision."""


@dataclass(frozen=True)
class Job:
    """One subprocess. system: gvpo, trl, plain, sampler, generate, or peak."""

    case: str
    system: str
    setting: str
    warmup: int
    steps: int
    repeat: int = 0
    stage: str = "measured"

    def key(self) -> dict[str, Any]:
        """What makes a result this job's."""
        return {name: getattr(self, name) for name in ("case", "system", "setting", "repeat", "stage")}
