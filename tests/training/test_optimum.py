"""The trainer itself reaches the closed-form optimum pi_ref * exp(R / beta) / Z on a model that can be enumerated."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from exact import END, LONGEST, PROMPT, all_sequences, exact_logprobs, tiny_llama, total_variation
from gvpo import Completion, Group, GVPOConfig, GVPOTrainer

BETA = 0.3
SEQUENCES = all_sequences()
REWARDS = torch.rand(len(SEQUENCES), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REWARD_OF = {tuple(ids): float(reward) for ids, reward in zip(SEQUENCES, REWARDS, strict=True)}


UPDATES, MEMBERS = 1000, 32


def train(**settings: Any) -> tuple[float, float]:
    """Train a fresh model; total variation to the closed-form optimum before and after."""
    data, rewards = settings.pop("data"), settings.pop("reward_funcs", None)
    model = tiny_llama()
    start = exact_logprobs(model)
    optimum = (start + REWARDS / BETA).log_softmax(0)
    common = {
        "beta": BETA,
        "reference": "initial",
        "learning_rate": 3e-3,
        "max_steps": UPDATES,
        "num_generations": MEMBERS,
        "groups_per_update": 1,
        "updates_per_rollout": 5,
        "max_completion_length": LONGEST,
        "disable_tqdm": True,
    }
    GVPOTrainer(model, data, rewards, config=GVPOConfig(**common | settings)).train()
    return total_variation(start, optimum), total_variation(exact_logprobs(model), optimum)


def offline_groups() -> list[Group]:
    """Groups drawn uniformly over sequences, with their rewards."""
    draws = random.Random(0)
    return [
        Group(
            None,
            [
                Completion(token_ids=ids, reward=REWARD_OF[tuple(ids)], truncated=ids[-1] != END, source="dataset")
                for ids in draws.choices(SEQUENCES, k=MEMBERS)
            ],
            prompt_ids=PROMPT,
        )
        for _ in range(UPDATES)
    ]


def reward(*, prompts: None, completions: None, completion_ids: list[list[int]], **columns: object) -> list[float]:
    assert prompts is None
    assert completions is None
    return [REWARD_OF[tuple(ids)] for ids in completion_ids]


def test_there_are_400_sequences_and_their_probabilities_sum_to_one() -> None:
    assert len(SEQUENCES) == 1 + 7 + 49 + 343
    assert float(exact_logprobs(tiny_llama()).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_offline_groups_drawn_uniformly_reach_the_optimum() -> None:
    before, after = train(data=offline_groups())
    assert before > 0.3
    assert after < 0.03


def test_the_policys_own_rollouts_reach_the_optimum() -> None:
    before, after = train(data=[{"prompt_ids": PROMPT}], reward_funcs=reward)
    assert before > 0.3
    assert after < 0.03


def test_another_beta_ends_somewhere_else() -> None:
    """The bound is one that a mistake of a third in the scale of the reward term does not meet."""
    start = exact_logprobs(tiny_llama())
    optimum, other = ((start + REWARDS / beta).log_softmax(0) for beta in (BETA, 0.75 * BETA))
    assert total_variation(optimum, other) > 0.03
