"""The log-prob head: hidden states to the log-probs of given tokens, in chunks that are recomputed in the backward pass.

Covered: any model whose logits are its output embedding of the base model's last hidden state, times a constant
(Cohere, Granite), softly capped (Gemma 2). Which transform a model applies is read from its config and then measured
against the model's own logits; a model that does something else is scored through its own logits. Not covered:
memory bounds for that fallback, where one batch's logits live at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gvpo.models.modes import evaluating

CHUNK_ELEMENTS = 2**24
"""Logits alive at once: 64 MiB in float32, whatever the batch and the vocabulary."""

_PROBE_TOLERANCE = 1e-4

LogitTransform = Callable[[Tensor], Tensor]
"""Hidden states (M, D) to logits (M, V)."""

_heads: weakref.WeakKeyDictionary[nn.Module, Callable[[Any], LogitTransform] | None] = weakref.WeakKeyDictionary()


def token_logprobs(hidden_MD: Tensor, targets_M: Tensor, logits: LogitTransform, vocabulary: int) -> Tensor:
    """log softmax(logits(hidden))[target] for each row, float32 (float64 for a float64 model), differentiable.

    hidden_MD: hidden states that precede the targets. targets_M: token ids. logits: hidden states to logits.
    Chunks are recomputed in the backward pass: no tensor of size tokens x vocabulary is kept.
    """
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    pieces = zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_logprobs(hidden, targets, logits) for hidden, targets in pieces])
    return torch.cat(
        [checkpoint(_chunk_logprobs, hidden, targets, logits, use_reentrant=False) for hidden, targets in pieces]
    )


def gather_logprobs(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """log softmax(logits)[target] for each row, at least float32."""
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return logits_MV.gather(1, targets_M[:, None])[:, 0] - logits_MV.logsumexp(1)


def _chunk_logprobs(hidden_MD: Tensor, targets_M: Tensor, logits: LogitTransform) -> Tensor:
    return gather_logprobs(logits(hidden_MD), targets_M)


def find_head(model: Any) -> LogitTransform | None:
    """The function from the base model's hidden states to the model's logits; None where no known one fits.

    The choice is made once per model, by comparing with the model's own logits on a few tokens.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        return None
    if model not in _heads:
        _heads[model] = next((make for make in _candidates(model) if _fits(model, make(model))), None)
    make = _heads[model]
    return None if make is None else make(model)


def _candidates(model: Any) -> Iterator[Callable[[Any], LogitTransform]]:
    config = model.config.get_text_config()
    cap = _first(config, "final_logit_softcapping", "logits_soft_cap")
    factor = _first(config, "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    for scale in [1.0] if factor is None else [factor, 1.0 / factor, 1.0]:
        yield lambda model, scale=scale: _transform(model.get_output_embeddings(), scale, cap)


def _transform(head: nn.Module, scale: float, cap: float | None) -> LogitTransform:
    def logits(hidden_MD: Tensor) -> Tensor:
        logits_MV = head(hidden_MD)
        if scale != 1.0:
            logits_MV = logits_MV * scale
        return logits_MV if cap is None else torch.tanh(logits_MV / cap) * cap

    return logits


def _first(config: Any, *names: str) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@torch.no_grad()
def _fits(model: Any, logits: LogitTransform) -> bool:
    embeddings = model.get_input_embeddings()
    tokens = torch.arange(8, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    inputs = {"input_ids": tokens, "position_ids": torch.arange(8, device=tokens.device)[None], "use_cache": False}
    with evaluating(model):
        own = model(**inputs).logits.float()
        hidden = model.base_model(**inputs).last_hidden_state
        ours = logits(hidden).float()
    return ours.shape == own.shape and bool((ours - own).abs().max() <= _PROBE_TOLERANCE * own.abs().max())
