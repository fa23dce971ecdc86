"""The sampler of a run: which one it is, and that it has the policy's weights whenever it draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from training_helpers import first_token, letters_tokenizer, offline_groups, prompts, run, settings, tiny_model

from gvpo.errors import UserError
from gvpo.group_files import write_groups
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

    def sample_one_by_one(self, prompts: Any, num_generations: int, params: Any, *, seeds: Any, drawn: Any) -> None:
        self.asked.append("greedy" if params.temperature == 0 else "draw")
        super().sample_one_by_one(prompts, num_generations, params, seeds=seeds, drawn=drawn)


@pytest.fixture(autouse=True)
def watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every trainer draw with a sampler that is watched."""

    def watched(*args: Any) -> Any:
        return Watched(make_sampler(*args))  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "make_sampler", watched)


def test_the_sampler_takes_the_weights_before_every_rollout_and_evaluation() -> None:
    config = settings(eval_on_start=True, eval_steps=2, max_steps=4)
    trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=config, eval_dataset=prompts(2))
    trainer.train()
    sampler: Any = trainer.sampler
    draw, evaluation = ["sync", "draw"], ["sync", "greedy"]
    assert sampler.asked == evaluation + draw + evaluation + draw + evaluation
    assert sampler.weights[0] == sampler.weights[1] and len(set(sampler.weights)) == 3


@pytest.mark.parametrize("where", ["dataset", "file", "teacher"])
def test_weights_are_taken_only_where_they_are_drawn_with(where: str, tmp_path: Path) -> None:
    data: Any = offline_groups()
    options: dict[str, Any] = {"reference": "initial"}
    if where == "file":
        write_groups(data, tmp_path / "groups.jsonl")
        data, options["sources"] = None, {"type": "files", "path": str(tmp_path / "groups.jsonl"), "uses": 4}
    if where == "teacher":
        tiny_model(5).save_pretrained(tmp_path)
        data, options["sources"] = prompts(), {"type": "teacher", "model": str(tmp_path), "members": 3}
    trainer = run(tiny_model(), data, first_token, eval_dataset=prompts(2), eval_steps=2, max_steps=4, **options)
    sampler: Any = trainer.sampler
    assert sampler.asked == ["sync", "greedy"] * 2
    assert sampler.weights[1] == next(trainer.model.parameters()).flatten()[0].item() != sampler.weights[0]


def test_a_rollout_with_one_row_to_draw_for_takes_the_weights() -> None:
    given = {"prompt": "a", "completions": ["b", "cc"], "rewards": [0.0, 1.0]}
    rows = [*[given] * 4, *[given] * 3, {"prompt": "d"}]  # a rollout of four rows, and another
    options: dict[str, Any] = {"tokenizer": letters_tokenizer(), "shuffle_dataset": False, "max_steps": 4}
    sampler: Any = run(tiny_model(), rows, first_token, **options).sampler
    assert sampler.asked == ["sync", "draw"]


def test_a_machine_without_vllm_is_told_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(UserError, match=r"gvpo\[vllm\]"):
        GVPOTrainer("no/such", prompts(), first_token, config=settings(use_vllm=True))
