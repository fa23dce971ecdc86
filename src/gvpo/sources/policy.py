"""What fills a group: the row's own completions, or draws from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gvpo.groups import Completion, Group
from gvpo.models.encoding import encode_prompt
from gvpo.sampling.sampler import Sample, Sampler, SamplingParams
from gvpo.sources.dataset import Row


class Source(Protocol):
    """Anything that fills groups for prompts."""

    def fill(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Group]:
        """One group a row, in order, without rewards; seeds: one a row, all that a draw may depend on."""
        ...


@dataclass
class PolicySource:
    """Completions drawn from the policy as it is now: pi_s = pi_theta (temperature and truncation as in `params`)."""

    sampler: Sampler
    tokenizer: Any | None
    num_generations: int
    params: SamplingParams
    source: str = "policy"

    def fill(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Group]:
        """One group of num_generations draws a row, in order; text is decoded where there is a tokenizer."""
        if not rows:
            return []
        prompts = [prompt_ids(row, self.tokenizer) for row in rows]
        drawn = self.sampler.sample(prompts, self.num_generations, self.params, seeds=seeds)
        return [
            Group(
                row.prompt,
                [self._completion(sample) for sample in samples],
                prompt_ids=ids,
                columns=dict(row.columns),
            )
            for row, ids, samples in zip(rows, prompts, drawn, strict=True)
        ]

    def _completion(self, sample: Sample) -> Completion:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        return Completion(text, sample.token_ids, source=self.source, truncated=sample.truncated)


def prompt_ids(row: Row, tokenizer: Any | None) -> list[int]:
    """The row's prompt as the model reads it: its own ids, or its text encoded."""
    if row.prompt_ids is not None:
        return list(row.prompt_ids)
    assert row.prompt is not None and tokenizer is not None
    return encode_prompt(row.prompt, tokenizer)


def draw_seed(seed: int, *place: int) -> int:
    """The seed of one prompt's draws, from the run's seed and where in the run the draw is; no state to carry."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
