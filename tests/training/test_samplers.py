"""The sampler of a run: which one it is, and that it has the policy's weights whenever it draws."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from training_helpers import first_token, prompts, settings, tiny_model

from gvpo.errors import UserError
from gvpo.sampling import TorchSampler
from gvpo.training import loop
from gvpo.training.loop import GVPOTrainer
from gvpo.training.samplers import make_sampler


class Watched(TorchSampler):
    """Keeps what it is asked, and the first weight at each sync."""

    def __init__(self, sampler: TorchSampler) -> None:
        super().__init__(sampler.model, sampler.end_token_ids)
        self.asked: list[str] = []
        self.weights: list[float] = []

    def sync(self) -> None:
        self.asked.append("sync")
        self.weights.append(next(self.model.parameters()).flatten()[0].item())

    def sample(self, prompts: Any, num_generations: int, params: Any, *, seeds: Any) -> Any:
        self.asked.append("greedy" if params.temperature == 0 else "draw")
        return super().sample(prompts, num_generations, params, seeds=seeds)


def test_the_sampler_takes_the_weights_before_every_rollout_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(*args: Any) -> Any:
        return Watched(make_sampler(*args))  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "make_sampler", watched)
    config = settings(eval_on_start=True, eval_steps=2, max_steps=4)
    trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=config, eval_dataset=prompts(2))
    trainer.train()
    sampler: Any = trainer.sampler
    draw, evaluation = ["sync", "draw"], ["sync", "greedy"]
    assert sampler.asked == evaluation + draw + evaluation + draw + evaluation
    assert sampler.weights[0] == sampler.weights[1] and len(set(sampler.weights)) == 3


def test_a_machine_without_vllm_is_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(UserError, match=r"gvpo\[vllm\]"):
        GVPOTrainer("no/such", prompts(), first_token, config=settings(use_vllm=True))
