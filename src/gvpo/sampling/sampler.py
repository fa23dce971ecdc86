"""What a sampler is given, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gvpo.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    `max_new_tokens`: at least 1, the end token included. `temperature`: 0 takes the most likely token; else the logits
    are divided by it. `top_k`: only the k most likely tokens, 0 = off. `top_p` in (0, 1]: only the smallest set of
    tokens with at least this mass, 1 = off. The order is Hugging Face generate's: temperature, top-k, top-p.

    Theorem 2 of the paper (arXiv 2504.19599) asks that every completion the reference can give can be drawn: plain
    softmax sampling meets it at any temperature above 0, top-k, top-p and greedy decoding do not.

    Raises UserError for a value out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number above 0 and at most 1 (1 = off)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give 0 (off) or a positive number")


@dataclass
class Sample:
    """One completion: its token ids, the end token included unless truncated (no end token within max_new_tokens)."""

    token_ids: list[int]
    truncated: bool


def check_request(prompts: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int]) -> None:
    """Raise UserError for no completions, an empty prompt, or another number of seeds than prompts."""
    if num_generations < 1:
        raise UserError(f"num_generations is {num_generations}: give at least 1")
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens: give at least one (the BOS token, say)")


class Sampler(Protocol):
    """Anything that draws completions, token ids in and token ids out."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """Draw `num_generations` completions of every prompt, in the order of the prompts.

        `prompts`: P sequences of token ids, none empty. `seeds`: one per prompt. What a prompt gets is fixed
        by the weights, its ids, `num_generations`, `params` and its seed, up to floating point; never by the other
        prompts of the call.
        """
        ...


class PolicySampler(Sampler, Protocol):
    """A sampler that draws from the policy of a run, from its own copy of the weights or from the model itself."""

    def sync(self) -> None:
        """Take the policy's weights as they are now: called by every process before a rollout or evaluation draws."""
        ...
