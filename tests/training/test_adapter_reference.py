"""The switched-off adapter as the reference: where it is the initial policy, to the bit, and where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_helpers import first_token, prompts, run, same_weights, settings, tiny_model, weights

from gvpo.errors import UserError
from gvpo.models.adapters import without_adapter
from gvpo.models.scoring import Scorer
from gvpo.training import reference as reference_module
from gvpo.training.loop import GVPOTrainer
from gvpo.training.reference import Reference


def adapted(model: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], **options}
    return get_peft_model(tiny_model() if model is None else model, LoraConfig(**config))


def wide(**options: Any) -> Any:
    return adapted(tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=2), **options)


def snapshots(model: Any) -> bool:
    """Whether "initial" takes a snapshot of this model."""
    reference = Reference("initial", Scorer(model))
    reference.start()
    return bool(reference.state_dict())


def trained(model: Any, **options: Any) -> GVPOTrainer:
    values = {"reference": "initial", "learning_rate": 0.1, "max_steps": 6, **options}
    return run(model, prompts(), first_token, **values)


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "lm_head"]}, {"use_rslora": True, "lora_dropout": 0.5}, {"r": 1}],
)
def test_an_adapter_that_adds_nothing_needs_no_snapshot(options: dict[str, Any]) -> None:
    assert not snapshots(adapted(**options))


def nudged(name: str) -> Any:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if name in n).view(-1)[-1] = 1e-30
    return model


def with_another() -> Any:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def with_a_norm() -> Any:
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def infinite() -> Any:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).view(-1)[0] = float("inf")
    return model


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def disabled() -> Any:
    model = adapted()
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


DOUBTFUL = {
    "not zero": lambda: adapted(init_lora_weights=False),
    "almost zero": lambda: nudged("lora_B"),
    "infinite": infinite,
    "dora": lambda: adapted(use_dora=True),
    "biases": lambda: adapted(tiny_model(attention_bias=True), bias="lora_only"),
    "a module": lambda: adapted(modules_to_save=["lm_head"]),
    "token rows": lambda: adapted(trainable_token_indices={"embed_tokens": [1]}),
    "another adapter": with_another,
    "a norm": with_a_norm,
    "merged": merged,
    "disabled": disabled,
    "no adapter": tiny_model,
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_any_doubt_takes_a_snapshot(name: str) -> None:
    assert snapshots(DOUBTFUL[name]())


@pytest.mark.parametrize("options", [{}, {"token_budget": 12}, {"share_prefix": False}, {"bf16": True}])
def test_untouched_weights_have_log_ratios_of_exactly_zero(options: dict[str, Any]) -> None:
    for model in (wide(), wide(target_modules=["q_proj", "embed_tokens", "lm_head"])):
        trainer = trained(model, learning_rate=0, **options)
        assert trainer.reference.state_dict() == {}
        assert [row["log_ratio/max"] for row in trainer.history] == [0.0] * 6


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"objective": "grpo", "token_budget": 16}])
def test_it_trains_as_a_snapshot_does(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    off = trained(wide(), **options)
    assert off.reference.state_dict() == {} and off.history[-1]["log_ratio/max"] > 0.05
    monkeypatch.setattr(reference_module, "adds_nothing", lambda layers: False)
    snapshot = trained(wide(), **options)
    assert snapshot.reference.state_dict()
    assert snapshot.history == off.history
    assert same_weights(weights(snapshot.model), weights(off.model))


def test_what_is_trained_stays_what_is_trained() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    start = weights(model)
    with pytest.raises(KeyboardInterrupt), without_adapter(model):
        raise KeyboardInterrupt
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    trainer = trained(model)
    assert trainer.reference.state_dict() == {}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    changed = {name.split(".")[-3] for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert changed == {"lora_B"}


# Checkpoints: the run that began decides, not the model that is given when it goes on.


@pytest.mark.parametrize("began_at_zero", [True, False])
@pytest.mark.parametrize("goes_on_from_zero", [True, False])
def test_a_run_goes_on_with_the_reference_that_it_began_with(
    tmp_path: Path, began_at_zero: bool, goes_on_from_zero: bool
) -> None:
    options = {"reference": "initial", "learning_rate": 0.1, "max_steps": 6, "save_steps": 3}
    config = settings(output_dir=str(tmp_path / "whole"), **options)
    whole = GVPOTrainer(adapted(init_lora_weights=began_at_zero), prompts(), first_token, config=config)
    whole.train()
    folder = tmp_path / "whole" / "checkpoints" / "step-3"
    assert (folder / "reference.safetensors").exists() is not began_at_zero
    model = adapted(init_lora_weights=goes_on_from_zero)
    again = GVPOTrainer(model, prompts(), first_token, config=settings(**options))
    again.train(resume_from_checkpoint=folder)
    assert again.history == whole.history and again.history[-1]["log_ratio/max"] > 0.05
    assert same_weights(weights(again.model), weights(whole.model))
    assert same_weights(again.reference.state_dict(), whole.reference.state_dict())


@pytest.mark.parametrize("reference", ["initial", 2])
def test_a_snapshot_that_is_needed_and_not_there(reference: Any) -> None:
    model = with_a_norm() if reference == "initial" else adapted()
    held = Reference(reference, Scorer(model))
    held.start()
    with pytest.raises(UserError, match="its reference is not of this kind"):
        held.load_state_dict({})
