"""Adapters through the scorer and the update: as the merged model, and the adapter alone learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import LONGEST, plain_logprobs, ragged_groups, tiny

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.scoring import Scorer, causal_lm, sequence_logprobs
from gvpo.training.update import accumulate_gradients

SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "attention and head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "a trained copy of the head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "a trained copy of the embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "rank-stabilised, decomposed": {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "use_rslora": True},
}


def adapted(kind: str = "attention", **overrides: Any) -> PeftModel:
    """A tiny Llama with an adapter whose effect is far from nought."""
    torch.manual_seed(1)
    settings = SETTINGS[kind] | {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | overrides
    model: Any = get_peft_model(tiny(), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def merged(model: PeftModel) -> Any:
    return copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]


def rewarded_groups(model: Any) -> list[Group]:
    """Rewards, and references some 5 nats away, uneven within each group."""
    groups = ragged_groups()
    with torch.no_grad():
        logps = iter(plain_logprobs(model, groups).tolist())
    for group in groups:
        for place, member in enumerate(group.completions):
            member.reward, member.ref_logprob = float(place % 3), next(logps) + 5.0 * (-1) ** place
    return groups


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
class TestAdapters:
    @pytest.mark.parametrize("kind", SETTINGS)
    def test_scores_are_those_of_the_merged_model(self, kind: str) -> None:
        model, groups = adapted(kind), ragged_groups()
        with torch.no_grad():
            plain_N = plain_logprobs(merged(model), groups)
            assert float((plain_logprobs(tiny(), groups) - plain_N).abs().max()) > 0.1  # the adapter matters
            for share_prefix in (True, False):
                for budget in (None, LONGEST):
                    ours_N = sequence_logprobs(model, groups, share_prefix=share_prefix, token_budget=budget)
                    assert float((ours_N.double() - plain_N).abs().max()) < 2e-4

    @pytest.mark.parametrize("kind", SETTINGS)
    def test_it_keeps_the_head_and_shares_prompts(self, kind: str) -> None:
        scorer = Scorer(adapted(kind))
        assert scorer.head is not None
        assert scorer.shares_prefix

    @pytest.mark.parametrize("kind", SETTINGS)
    @pytest.mark.parametrize("budget", [None, LONGEST])
    def test_the_gradient_is_that_of_autograd_and_the_adapters_alone(self, kind: str, budget: int | None) -> None:
        model = adapted(kind)
        groups = rewarded_groups(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        accumulate_gradients(model, groups, beta=0.1, token_budget=budget)
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained

        twin = adapted(kind)
        losses = []
        logps = iter(plain_logprobs(twin, groups).unbind())
        for group in groups:
            errors = torch.stack([0.1 * (next(logps) - c.ref_logprob) - c.reward for c in group.completions])  # pyright: ignore
            if len(errors) >= 2:
                losses.append((errors - errors.mean()).square().sum() / (2 * (len(errors) - 1)))
        torch.stack(losses).mean().backward()
        ours, plain = (
            torch.cat(
                [parameter.grad.flatten() for _, parameter in one.named_parameters() if parameter.grad is not None]
            )
            for one in (model, twin)
        )
        assert float((ours - plain).norm() / plain.norm()) < 1e-5

    def test_a_model_that_was_scored_before_it_was_adapted(self) -> None:
        base, groups = tiny(), ragged_groups()
        before_N = sequence_logprobs(base, groups)
        model: Any = get_peft_model(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
        with torch.no_grad():
            ours_N = sequence_logprobs(model, groups)
            assert float((ours_N.double() - plain_logprobs(merged(model), groups)).abs().max()) < 2e-4
        assert float((ours_N - before_N.detach()).abs().max()) > 0.01

    def test_a_switched_off_adapter_is_the_base_model(self) -> None:
        model, groups = adapted("attention and head"), ragged_groups()
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(sequence_logprobs(model, groups), sequence_logprobs(tiny(), groups))

    def test_the_causal_model_inside(self) -> None:
        model = adapted()
        assert causal_lm(model) is model.get_base_model()
        plain = tiny()
        assert causal_lm(plain) is plain


class TestVirtualTokens:
    @pytest.mark.parametrize("settings", [PromptTuningConfig, PrefixTuningConfig])
    def test_are_refused(self, settings: Any) -> None:
        model = get_peft_model(tiny(), settings(task_type="CAUSAL_LM", num_virtual_tokens=3))
        for use in (
            lambda: sequence_logprobs(model, ragged_groups()),
            lambda: accumulate_gradients(model, rewarded_groups(tiny()), beta=0.1),
        ):
            with pytest.raises(
                UserError, match=r"adapters prepend virtual tokens and cannot be scored; use LoRA"
            ) as caught:
                use()
            assert "\n" not in str(caught.value)
