"""This trainer, TRL's, and the two samplers, each at the work of a case, with the seconds of every step's parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from cases import OURS, TRL, Case
from forced import check_lengths, force_generate, force_sampler, make_model, make_prompts, reward

from gvpo import GVPOConfig, GVPOTrainer
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler
from gvpo.training.devices import keep_freed_memory
from gvpo.training.reporter import Stopwatch

Steps = list[dict[str, float]]
Loaded = Callable[[], None]
"""To be called when the model is loaded: memory is counted from there."""

RATE = 1e-6
"""Learning rate of all: the work is the same at any."""


class StepWatch(Stopwatch):
    """The trainer's own stopwatch, which also keeps what every update took."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: Steps = []
        self.last = time.perf_counter()

    def take(self) -> dict[str, float]:
        """As in Stopwatch: called once an update, at its end."""
        seconds, now = super().take(), time.perf_counter()
        part = {name.removeprefix("seconds/"): value for name, value in seconds.items()}
        step = {"sampling": part["rollout"], "scoring": part.get("reward", 0.0) + part.get("reference", 0.0)}
        self.steps.append(step | {"update": part["update"], "whole": now - self.last})
        self.last = now
        return seconds


def run_gvpo(case: Case, setting: str, count: int, loaded: Loaded) -> Steps:
    """This trainer, one update a rollout. Without a tokenizer: nothing then ends a completion but its length."""
    model, tokenizer = make_model(case)
    _, prompts = make_prompts(case, tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    force_sampler(case, prompts)
    config = GVPOConfig(
        num_generations=case.k,
        max_completion_length=case.max_tokens,
        groups_per_update=case.prompts,
        updates_per_rollout=1,
        max_steps=count,
        learning_rate=RATE,
        shuffle_dataset=False,
        disable_tqdm=True,
        **{"token_budget": case.token_budget} | OURS[setting],
    )

    trainer = GVPOTrainer(model, [{"prompt_ids": ids} for ids in prompts], reward, config=config)
    loaded()
    trainer.stopwatch = watch = StepWatch()
    drawn = trainer.sampler.sample

    def checked(*given: Any, **named: Any) -> Any:
        groups = drawn(*given, **named)
        if case.processes == 1:
            check_lengths(case, [sample.token_ids for group in groups for sample in group])
        return groups

    trainer.sampler.sample = checked
    trainer.train()
    return watch.steps


def run_trl(case: Case, setting: str, count: int, loaded: Loaded) -> Steps:
    """TRL's GRPOTrainer: one generation and one optimizer step for all completions of a step; beta 0, no reference."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    how, completions = TRL[setting], case.prompts * case.k
    if how.keeps_memory:
        keep_freed_memory()
    steps: Steps = []

    class Timed(GRPOTrainer):
        def _generate(self, *given: Any) -> Any:
            start = time.perf_counter()
            drawn = super()._generate(*given)
            self.sampling = time.perf_counter() - start
            check_lengths(case, drawn[1])
            return drawn

        def _generate_and_score_completions(self, *given: Any) -> Any:
            start = time.perf_counter()
            scored = super()._generate_and_score_completions(*given)
            self.scoring = time.perf_counter() - start - self.sampling
            self.generations += 1
            return scored

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *given: Any, **named: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            now = time.perf_counter()
            assert trainer.generations == len(steps) + 1, "not one generation a step"
            step = {"sampling": trainer.sampling, "scoring": trainer.scoring, "whole": now - self.last}
            steps.append(step | {"update": step["whole"] - step["sampling"] - step["scoring"]})
            self.last = now

    model, tokenizer = make_model(case)
    model = model.to(getattr(torch, how.weights))
    texts, prompts = make_prompts(case, tokenizer)
    force_generate(model, case, prompts, [tokenizer.eos_token_id])
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=how.autocast,
            torch_compile=how.compiled,
            per_device_train_batch_size=how.micro_batch,
            gradient_accumulation_steps=completions // how.micro_batch,
            gradient_checkpointing=False,
            num_generations=case.k,
            max_completion_length=case.max_tokens,
            num_iterations=1,
            beta=0.0,
            learning_rate=RATE,
            max_steps=count,
            shuffle_dataset=False,
            use_vllm=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"prompt": texts})
        trainer: Any = Timed(model, reward, config, data, processing_class=tokenizer, callbacks=[Clock()])
        assert config.generation_batch_size == completions
        trainer.generations = 0
        loaded()
        trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {getattr(torch, how.weights)}
    return steps


def run_sampler(case: Case, setting: str, count: int, loaded: Loaded) -> Steps:
    """The embedded sampler alone, as in a run: float32 weights, of which it makes a copy of the setting's dtype."""
    keep_freed_memory()
    model, tokenizer = make_model(case)
    _, prompts = make_prompts(case, tokenizer)
    force_sampler(case, prompts)
    sampler, params = TorchSampler(model, (), dtype=_dtype(setting)), SamplingParams(case.max_tokens)
    loaded()

    def draw(number: int) -> list[list[int]]:
        groups = sampler.sample(prompts, case.k, params, seeds=range(number * 1000, number * 1000 + case.prompts))
        return [sample.token_ids for group in groups for sample in group]

    return _timed(case, draw, count)


def run_generate(case: Case, setting: str, count: int, loaded: Loaded) -> Steps:
    """`model.generate` alone, all completions in one batch, on weights of the setting's dtype."""
    from plain import cut, sample

    keep_freed_memory()
    model, tokenizer = make_model(case)
    model = model.to(_dtype(setting))
    _, prompts = make_prompts(case, tokenizer)
    force_generate(model, case, prompts, [tokenizer.eos_token_id])
    rows_NT = torch.tensor(prompts).repeat_interleave(case.k, 0)
    loaded()

    def draw(number: int) -> list[list[int]]:
        sequences_NT = sample(model, rows_NT, case.max_tokens, tokenizer.pad_token_id)
        return cut(sequences_NT[:, case.prompt_tokens :], tokenizer.eos_token_id)[0]

    return _timed(case, draw, count)


def _timed(case: Case, draw: Callable[[int], list[list[int]]], count: int) -> Steps:
    steps = []
    for number in range(count):
        start = time.perf_counter()
        completions = draw(number)
        seconds = time.perf_counter() - start
        check_lengths(case, completions)
        steps.append({"sampling": seconds, "scoring": 0.0, "update": 0.0, "whole": seconds})
    return steps


def _dtype(setting: str) -> torch.dtype:
    return torch.bfloat16 if setting == "bf16" else torch.float32
