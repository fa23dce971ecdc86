"""A model small enough to enumerate: every sequence, its exact probability, and the closed-form optimum."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LONGEST, END = 8, 3, 7
PROMPT = [END]
"""A token that no completion holds before its end. To a model with relative positions [0] and [0, 0] are one context
(attention averages equal values): a prompt of [0] would put the optimum out of every such model's reach."""


def tiny_llama(
    seed: int = 0, *, vocabulary: int = VOCABULARY, scale: float = 1.0, **overrides: object
) -> LlamaForCausalLM:
    """A random two-layer Llama in float32; scale multiplies its logits."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": END if vocabulary == VOCABULARY else None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        **overrides,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def all_sequences() -> list[list[int]]:
    """All 400 completions of at most LONGEST tokens: 1 + 7 + 49 that end, 343 cut off at the limit."""
    words = range(END)
    ended = [[*body, END] for n in range(LONGEST) for body in itertools.product(words, repeat=n)]
    truncated = [list(body) for body in itertools.product(words, repeat=LONGEST)]
    return ended + truncated


@torch.no_grad()
def exact_logprobs(model: torch.nn.Module) -> Tensor:
    """log pi(y | PROMPT) of all_sequences(), float64, from plain forwards one sequence at a time."""
    values = []
    for completion in all_sequences():
        ids = torch.tensor([PROMPT + completion])
        logps = model(ids).logits[0].double().log_softmax(-1)
        values.append(sum(logps[len(PROMPT) - 1 + place, token] for place, token in enumerate(completion)))
    return torch.stack(values)  # pyright: ignore


def total_variation(logp: Tensor, other: Tensor) -> float:
    """Total variation between two distributions given by log-probs."""
    return float((logp.exp() - other.exp()).abs().sum() / 2)
