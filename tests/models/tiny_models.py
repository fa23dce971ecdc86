"""Tiny random models of many architectures, ragged groups, and the plain way to score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gvpo.groups import Completion, Group

VOCABULARY = 32

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "tie_word_embeddings": False,
    # Large: positions, neighbours and the past must all matter, or a mistake about them would not show.
    "initializer_range": 0.3,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
_FALCON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CAPS: dict[str, Any] = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES),
    "qwen2": ("Qwen2", _SIZES),
    "qwen3": ("Qwen3", _SIZES),
    "mixtral": ("Mixtral", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", _SIZES | {"logit_scale": 0.25}),
    "granite": ("Granite", _SIZES | {"logits_scaling": 6.0, "residual_multiplier": 0.7}),
    "gemma2 without windows": ("Gemma2", _SIZES | _CAPS | {"layer_types": ["full_attention"] * 2}),
    "gpt2": ("GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "opt": ("OPT", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3}),
    "falcon": ("Falcon", _FALCON | {"alibi": False}),
    # What sees a window, a chunk or the order of columns cannot read a packed row.
    "mistral": ("Mistral", _SIZES | {"sliding_window": 4}),
    "gemma2": ("Gemma2", _SIZES | _CAPS | {"sliding_window": 4}),
    "llama4": ("Llama4Text", _SIZES | {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48}),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3}
        | {"window_size": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "falcon alibi": ("Falcon", _FALCON | {"alibi": True}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.3}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}),
    "recurrent_gemma": (
        "RecurrentGemma",
        _SIZES | {"num_hidden_layers": 3, "attention_window_size": 4, "lru_width": 32, "logits_soft_cap": 3.0},
    ),
    "qwen3_next": (
        "Qwen3Next",
        _SIZES
        | _EXPERTS
        | {
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        }
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
SHARING = list(ARCHITECTURES)[: list(ARCHITECTURES).index("mistral")]
"""Full attention and told positions: a group is one row."""
WITHOUT_SDPA = {"gemma2", "gemma2 without windows", "gpt_neo", "bloom", "mpt", "mamba"}


def tiny(architecture: str = "llama", seed: int = 0, attention: str = "eager", **overrides: Any) -> Any:
    """A random float32 model in evaluation mode, whose predictions are far from uniform."""
    name, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**_TOKENS | settings | overrides, attn_implementation=attention)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        with torch.no_grad():
            head.mul_(3.0)
    return model


def ragged_groups(seed: int = 0, vocabulary: int = VOCABULARY) -> list[Group]:
    """Groups of 3, 1, 4 and 2: prompts of 1 to 7 tokens, completions of 0 to 12, one of them partly given."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    lengths = [(3, [5, 1, 9]), (7, [2]), (1, [4, 12, 0, 4]), (5, [6, 3])]
    groups = [Group(None, [Completion(token_ids=ids(n)) for n in rest], prompt_ids=ids(n)) for n, rest in lengths]
    groups[0].completions[2].loss_mask = [True, True, False, False, False, True, True, False, True]
    groups[2].completions[2].truncated = True
    groups[2].completions[3].token_ids = groups[2].completions[0].token_ids  # drawn twice
    return groups


LONGEST = 13
"""Tokens of the longest prompt with completion in ragged_groups."""


def plain_logprobs(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """log pi(y|x) in float64: one sequence at a time, the whole of its logits, no mask, no head of ours."""
    scores = []
    for group in groups:
        assert group.prompt_ids is not None
        for completion in group.completions:
            assert completion.token_ids is not None
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logps_LV = model(ids).logits[0].double().log_softmax(-1)
            score = torch.zeros((), dtype=torch.float64)
            for place, token in enumerate(completion.token_ids):
                if completion.loss_mask is None or completion.loss_mask[place]:
                    score = score + logps_LV[len(group.prompt_ids) + place - 1, token]
            scores.append(score)
    return torch.stack(scores)
