"""What is trained: seeds, precision, memory, dropout, and the kinds of model that the trainer takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_helpers import (
    END,
    first_token,
    letters_tokenizer,
    offline_groups,
    prompts,
    run,
    same_weights,
    settings,
    tiny_model,
    weights,
)
from transformers import AutoModelForCausalLM

from gvpo.errors import UserError
from gvpo.sampling.sampler import SamplingParams
from gvpo.training.config import ConfigError
from gvpo.training.loop import GVPOTrainer

# Reproducibility


def trained(**options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    model = tiny_model()
    trainer = run(model, prompts(9), first_token, **options)
    return weights(model), trainer.history


def test_a_seed_gives_the_same_numbers_bit_for_bit() -> None:
    one, again, other = trained(seed=1), trained(seed=1), trained(seed=2)
    assert one[1] == again[1] and same_weights(one[0], again[0])
    assert one[1] != other[1] and not same_weights(one[0], other[0])


def test_global_random_state_plays_no_part() -> None:
    torch.manual_seed(123)
    one = trained()
    torch.manual_seed(456)
    assert trained()[1] == one[1]


# Precision, memory, dropout


def test_bf16_trains_float32_masters() -> None:
    model = tiny_model(hidden_size=64)
    before = weights(model)
    history = run(model, prompts(), first_token, bf16=True).history
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in history)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same_weights(before, weights(model))
    full = run(tiny_model(hidden_size=64), offline_groups(), max_steps=1).history[0]
    half = run(tiny_model(hidden_size=64), offline_groups(), max_steps=1, bf16=True).history[0]
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05) and half["grad_norm"] != full["grad_norm"]


def test_a_float64_model_trains_in_float64() -> None:
    model = tiny_model().double()
    run(model, offline_groups(), max_steps=1)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model(num_hidden_layers=2)
        history = run(model, offline_groups(), gradient_checkpointing=checkpointing).history
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        results.append((weights(model), [row["grad_norm"] for row in history]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], atol=1e-6, rtol=0)


def test_compiled_layers_change_nothing_but_rounding() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        model = tiny_model(num_hidden_layers=2)
        history = run(model, prompts(), first_token, updates_per_rollout=2, max_steps=4, torch_compile=compiled).history
        # One graph before attention and one behind it; only scores and updates have them, drawing does not.
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2) == compiled
        assert all(layer._compiled_call_impl is None for layer in model.model.layers), "compiled after the run"
        # The first update after a rollout: scored without a graph, then with one, by the same weights.
        assert history[0]["log_ratio/std"] == history[2]["log_ratio/std"] == 0
        results.append([row["grad_norm"] for row in history])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("backend='inductor' raised:\nno compiler that works\n")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"torch_compile: .* for cpu here: no compiler that works$"):
        run(tiny_model(), prompts(), first_token, torch_compile=True)
    model = tiny_model()
    model._no_split_modules = model.model._no_split_modules = None
    with pytest.raises(UserError, match="LlamaForCausalLM does not name its layers"):
        run(model, prompts(), first_token, torch_compile=True)
    with pytest.raises(ConfigError, match=r"'torch_compile'.*gradient_checkpointing"):
        settings(torch_compile=True, gradient_checkpointing=True)


def test_dropout_is_switched_off_or_refused() -> None:
    model = tiny_model(attention_dropout=0.5)
    before = weights(model)
    with pytest.raises(UserError, match="disable_dropout=True") as caught:
        run(model, prompts(), first_token, disable_dropout=False)
    assert "\n" not in str(caught.value) and "twice" in str(caught.value)
    assert same_weights(before, weights(model))
    without_it = run(tiny_model(), prompts(), first_token).history
    assert run(model, prompts(), first_token, disable_dropout=True).history == without_it


def test_dropout_is_found_where_the_first_rollout_teaches_nothing() -> None:
    class Late:
        calls = 0

        def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> Sequence[float | None]:
            self.calls += 1
            return [None] * len(completion_ids) if self.calls == 1 else first_token(completion_ids)

    with pytest.raises(UserError, match="disable_dropout=True"):
        run(tiny_model(attention_dropout=0.5), prompts(), Late(), disable_dropout=False)


# Models


def test_a_module_is_trained_in_place() -> None:
    model = tiny_model()
    trainer = GVPOTrainer(model, prompts(), first_token, config=settings())
    assert trainer.model is model
    trainer.train()
    assert trainer.model is model and not same_weights(weights(model), weights(tiny_model()))


def test_a_path_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [text.count("a") for text in completions]

    trainer = run(str(tmp_path), [{"prompt": "abc"}], reward)
    assert trainer.tokenizer is not None and trainer.tokenizer.eos_token == "~"


def test_an_adapter_is_all_that_is_trained_and_saved(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = weights(model)
    trainer = run(model, prompts(), first_token, output_dir=str(tmp_path / "run"), reference="initial", save_steps=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)
    assert trainer.model is model and trainer.history[-1]["log_ratio/max"] > 0
    saved = tmp_path / "run" / "model"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_sampling_stops_at_the_end_token_and_truncates_without() -> None:
    trainer = run(tiny_model(), prompts(), first_token, max_completion_length=30)
    drawn = trainer.sampler.sample([[1]] * 20, 1, SamplingParams(30), seeds=range(20))
    for (sample,) in drawn:
        assert sample.truncated == (sample.token_ids[-1] != END) and END not in sample.token_ids[:-1]
