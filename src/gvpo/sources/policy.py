"""What draws completions: the `Source` protocol, and the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gvpo.groups import Completion, Group
from gvpo.models.encoding import encode_prompt
from gvpo.sampling.sampler import Sampler, SamplingParams
from gvpo.sources.dataset import Row


class Source(Protocol):
    """Anything that makes groups for prompts."""

    def fill(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Group]:
        """One group per row, in order. seeds: one per row, all that a draw may depend on.

        Rewards that the members bring are kept; the reward functions score the groups that bring none.
        """
        ...


@dataclass
class PolicySource:
    """Completions drawn from the policy as it is now: pi_s = pi_theta (temperature and truncation as in `params`)."""

    sampler: Sampler
    tokenizer: Any | None
    num_generations: int
    params: SamplingParams

    def fill(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Group]:
        """One group of num_generations draws per row, in order, as token ids."""
        if not rows:
            return []
        prompts = [prompt_ids(row, self.tokenizer) for row in rows]
        drawn = self.sampler.sample(prompts, self.num_generations, self.params, seeds=seeds)
        return [
            Group(
                row.prompt,
                [Completion(None, one.token_ids, source="policy", truncated=one.truncated) for one in samples],
                prompt_ids=ids,
                columns=dict(row.columns),
            )
            for row, ids, samples in zip(rows, prompts, drawn, strict=True)
        ]


def prompt_ids(row: Row, tokenizer: Any | None) -> list[int]:
    """The row's prompt as the model reads it: its own ids, or its text encoded."""
    if row.prompt_ids is not None:
        return list(row.prompt_ids)
    assert row.prompt is not None and tokenizer is not None
    return encode_prompt(row.prompt, tokenizer)


def draw_seed(seed: int, *place: int) -> int:
    """The seed of one prompt's draws, from the run's seed and where in the run the draw is; no state to carry."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
