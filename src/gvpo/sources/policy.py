"""The policy itself as a source of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo.groups import Completion
from gvpo.sampling.sampler import Sample, Sampler, SamplingParams
from gvpo.sources.dataset import Row
from gvpo.sources.source import prompt_ids


@dataclass
class PolicySource:
    """Completions drawn from the policy as it is now: pi_s = pi_theta (temperature and truncation as in `params`).

    update: how many updates it has had, kept in the completions' meta; None = nobody asks how old they are.
    """

    sampler: Sampler
    tokenizer: Any | None
    params: SamplingParams
    update: int | None = None

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """wanted[i] draws for row i, as token ids."""
        filled: list[list[Completion]] = [[] for _ in rows]
        self.fill_one_by_one(rows, wanted, seeds, filled.__setitem__)
        return filled

    def fill_one_by_one(
        self,
        rows: Sequence[Row],
        wanted: Sequence[int],
        seeds: Sequence[int],
        drawn: Callable[[int, list[Completion]], None],
    ) -> None:
        """As `fill`, each row's draws handed over with its place as soon as they are all there."""
        prompts = [prompt_ids(row, self.tokenizer) for row in rows]
        meta = {} if self.update is None else {"update": self.update}

        def hand_over(place: int, samples: list[Sample]) -> None:
            drawn(place, [Completion(None, one.token_ids, truncated=one.truncated, meta=meta) for one in samples])

        draw(self.sampler, prompts, wanted, self.params, seeds, hand_over)


def draw(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    wanted: Sequence[int],
    params: SamplingParams,
    seeds: Sequence[int],
    drawn: Callable[[int, list[Sample]], None],
) -> None:
    """wanted[i] samples of prompt i, handed over with i; prompts that want as many as each other are drawn together.

    One by one where the sampler can (`sample_one_by_one`).
    """
    for place in [place for place, count in enumerate(wanted) if count <= 0]:
        drawn(place, [])
    for count in sorted({count for count in wanted if count > 0}):
        places = [place for place, one in enumerate(wanted) if one == count]
        asked, theirs = [prompts[place] for place in places], [seeds[place] for place in places]
        if hasattr(sampler, "sample_one_by_one"):
            sampler.sample_one_by_one(  # pyright: ignore[reportAttributeAccessIssue]
                asked, count, params, seeds=theirs, drawn=lambda n, samples, places=places: drawn(places[n], samples)
            )
            continue
        for place, samples in zip(places, sampler.sample(asked, count, params, seeds=theirs), strict=True):
            drawn(place, samples)


def draw_seed(seed: int, *place: int) -> int:
    """The seed of one prompt's draws, from the run's seed and where in the run the draw is; no state to carry."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
