"""Decoding by shared prefixes: architectures against plain forwards, memory held, the model left alone."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo.sampling import shared_prefix
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.shared_prefix import SharedPrefixReader, can_share
from gvpo.sampling.torch_sampler import TorchSampler

END = 5
VOCABULARY = 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}
FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

SHARING: dict[str, dict[str, Any]] = {
    "cohere": COMMON,
    "deepseek_v2": {**COMMON, **LATENT, **ROUTED, "num_key_value_heads": 4, "head_dim": 4, "topk_method": "greedy"},
    "deepseek_v3": {**COMMON, **LATENT, **ROUTED, "num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1},
    "ernie4_5": {**COMMON, "head_dim": 8},
    "gemma": {**COMMON, "head_dim": 8},
    "gemma3_text": {**COMMON, **FULL, "head_dim": 8},
    "glm4": {**COMMON, "head_dim": 8, "pad_token_id": 0},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {**SIZES, "max_position_embeddings": 256},
    "granite": COMMON,
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": None, "head_dim": 8},
    "mixtral": {**COMMON, **EXPERTS, "head_dim": 8},
    "olmo2": COMMON,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    "persimmon": {**SIZES, "max_position_embeddings": 256},
    "phi": COMMON,
    "phi3": {**COMMON, "pad_token_id": 0},
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 8},
    "smollm3": {**COMMON, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "starcoder2": COMMON,
}

APART: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {**COMMON, **FULL, "head_dim": 8},
    "gpt_oss": {**COMMON, **EXPERTS, **FULL, "head_dim": 8},
    "gptj": {**GPT2, "rotary_dim": 4},
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "olmo3": {**COMMON, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
}


def random_model(kind: str, given: dict[str, Any]) -> Any:
    """Weights so large that attention, positions and experts all show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **given)
    config._experts_implementation = "eager"  # the grouped products know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def llama(**given: Any) -> Any:
    return random_model("llama", {**COMMON, **given})


def ragged(lengths: tuple[int, ...]) -> list[list[int]]:
    drawn = random.Random(1)
    return [[drawn.randrange(END + 1, VOCABULARY) for _ in range(length)] for length in lengths]


def differing(model: Any, prompts: list[list[int]], tokens: int, room: int | None = None) -> tuple[int, int]:
    """Greedy tokens that plain forwards would not have chosen, and the most tokens in one completion."""
    greedy = SamplingParams(temperature=0, max_new_tokens=tokens)
    drawn = TorchSampler(model, {END}, max_batch_tokens=room).sample(prompts, 2, greedy, seeds=range(len(prompts)))
    wrong = longest = 0
    for prompt, samples in zip(prompts, drawn, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + sample.token_ids]), use_cache=False).logits[0]
            best = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            wrong += sum(ours != own for ours, own in zip(sample.token_ids, best, strict=True))
            longest = max(longest, len(best))
    return wrong, longest


@pytest.mark.parametrize("kind", SHARING)
def test_greedy_tokens_are_those_of_plain_forwards(kind: str) -> None:
    model = random_model(kind, SHARING[kind])
    assert can_share(model)
    # Room for two prompts or three: rows join others that have read much, and buffers grow.
    wrong, longest = differing(model, ragged((1, 3, 30, 12)), 70, room=340)
    assert wrong == 0 and longest > 20


@pytest.mark.parametrize("kind", APART)
def test_what_attends_otherwise_does_not_share(kind: str) -> None:
    assert not can_share(random_model(kind, APART[kind]))


@pytest.mark.parametrize("asked", ["indices", "block_indices", "sinks", "s_aux", "softcap", "never_heard_of"])
def test_what_is_not_known_is_not_passed_over(asked: str) -> None:
    class Reader:
        def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
            return query

    states = torch.zeros(1, 1, 1, 4)

    def attend(layer: int | None, **given: Any) -> None:
        module, reader = SimpleNamespace(layer_idx=layer), cast(Any, Reader())
        shared_prefix._attend(module, states, states, states, None, shared_prefix=reader, **given)

    attend(0, position_ids=states, dropout=0.0)
    with pytest.raises(shared_prefix.Unsupported):
        attend(0, **{asked: states})
    with pytest.raises(shared_prefix.Unsupported):
        attend(None)


def test_a_base_model_that_hands_nothing_on_does_not_share() -> None:
    model = llama()
    own = model.model.forward

    def forward(input_ids: Any, position_ids: Any = None, use_cache: Any = None) -> Any:
        return own(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model.model.forward = forward
    assert not can_share(model)


@pytest.mark.parametrize(
    ("lengths", "count", "tokens", "room"),
    [
        ((4,) * 60 + (150,) * 2, 2, 4, 600),  # many short prompts, then few long ones
        ((4,) * 60, 4, 2, 300),  # completions far shorter than a block of places
        ((60,) * 9, 4, 80, 1000),  # several blocks, rows that join midway
    ],
)
def test_what_is_held_never_exceeds_the_room(
    lengths: tuple[int, ...], count: int, tokens: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    attend = SharedPrefixReader.attend

    def watched(self: SharedPrefixReader, layer: int, *given: Any) -> Any:
        result, kept = attend(self, layer, *given), self._layers[layer]
        held.append(sum(one[0].shape[0] * one[0].shape[2] for one in (kept.prompts, kept.own) if one))
        return result

    monkeypatch.setattr(SharedPrefixReader, "attend", watched)
    model = llama(num_hidden_layers=1)
    assert can_share(model)
    held.clear()
    params = SamplingParams(max_new_tokens=tokens)
    seeds = range(len(lengths))
    TorchSampler(model, {END}, max_batch_tokens=room).sample(ragged(lengths), count, params, seeds=seeds)
    assert room / 4 < max(held) <= room


def test_what_a_hook_keeps_of_a_training_forward_is_no_obstacle() -> None:
    class Keeping:
        seen: Any = None

        def __call__(self, module: Any, args: Any, output: Any) -> None:
            self.seen = output

    model, keeping = llama(), Keeping()
    model.model.layers[0].register_forward_hook(keeping)
    assert can_share(model)
    model.last = model(input_ids=torch.tensor([[1, 2]])).logits
    assert keeping.seen.grad_fn is not None
    assert differing(model, ragged((3,)), 5)[0] == 0


def test_a_failure_midway_leaves_the_model_as_it_was() -> None:
    model = llama(attn_implementation="eager").train()
    model.model.layers[0].eval()
    assert can_share(model)
    flags, config, calls = [module.training for module in model.modules()], model.config.to_dict(), [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("in the middle")

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        TorchSampler(model, {END}).sample(ragged((2, 9)), 2, SamplingParams(max_new_tokens=9), seeds=[0, 1])
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config and model.config._attn_implementation == "eager"
    assert torch.is_grad_enabled()
