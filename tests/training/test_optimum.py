"""The trainer itself reaches the closed-form optimum pi_ref * exp(R / beta) / Z on a model that can be enumerated."""

from __future__ import annotations

import random

import pytest
import torch
from exact import END, LONGEST, PROMPT, all_sequences, exact_logprobs, tiny_llama, total_variation

from gvpo import Completion, Group, GVPOConfig, GVPOTrainer

BETA = 0.3
SEQUENCES = all_sequences()
REWARDS = torch.rand(len(SEQUENCES), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REWARD_OF = {tuple(ids): float(reward) for ids, reward in zip(SEQUENCES, REWARDS, strict=True)}


def config(**settings: object) -> GVPOConfig:
    common = {
        "beta": BETA,
        "reference": "initial",
        "groups_per_update": 1,
        "max_completion_length": LONGEST,
        "disable_tqdm": True,
    }
    return GVPOConfig(**common | settings)  # pyright: ignore[reportArgumentType]


def test_there_are_400_sequences_and_their_probabilities_sum_to_one() -> None:
    assert len(SEQUENCES) == 1 + 7 + 49 + 343
    assert float(exact_logprobs(tiny_llama()).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def offline_groups(count: int, k: int) -> list[Group]:
    draws = random.Random(0)
    return [
        Group(
            None,
            [
                Completion(token_ids=ids, reward=REWARD_OF[tuple(ids)], truncated=ids[-1] != END, source="dataset")
                for ids in draws.choices(SEQUENCES, k=k)
            ],
            prompt_ids=PROMPT,
        )
        for _ in range(count)
    ]


def reward(*, completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [REWARD_OF[tuple(ids)] for ids in completion_ids]
