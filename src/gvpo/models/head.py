"""The log-prob head: hidden states to the log-probs of given tokens, in chunks, most of which are recomputed.

Logits that are a plain linear layer's go through Liger Kernel's fused kernel where it can run: the same chunks, each
passed over fewer times.

Covered: any model whose logits are its output embedding of the base model's last hidden state, times a constant
(Cohere, Granite), softly capped (Gemma 2). Which transform a model applies is read from its config and then measured
against the model's own logits; a model that does something else is scored through its own logits. Not covered:
memory bounds for that fallback, where one batch's logits live at once.
"""

from __future__ import annotations

import importlib.metadata
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gvpo.models.modes import probing, triton_obstacle

CHUNK_ELEMENTS = 2**24
"""Logits made at once: 64 MiB in float32, whatever the batch and the vocabulary."""

KEPT_CHUNKS = 4
"""Chunks that wait for their backward pass with their softmax: 256 MiB. Those before them are recomputed in it."""

_PROBE_TOLERANCE = 1e-4
_PROBE_LOGITS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Small ones, beside which a bias is seen, and large ones, on which a cap or a power is."""

_LIGER = (0, 8, 2)
"""Versions before it scale the summed gradient of the weight by the first token's upstream gradient."""

LogitTransform = Callable[[Tensor], Tensor]
"""Hidden states (M, D) to logits (M, V)."""


@dataclass(frozen=True)
class PlainHead:
    """Logits that are a module's own output, with nothing done to them."""

    module: nn.Module

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        return self.module(hidden_MD)


_heads: weakref.WeakKeyDictionary[nn.Module, Callable[[Any], LogitTransform] | None] = weakref.WeakKeyDictionary()


def token_logprobs(hidden_MD: Tensor, targets_M: Tensor, logits: LogitTransform, vocabulary: int) -> Tensor:
    """log softmax(logits(hidden))[target] for each row, float32 (float64 for a float64 model), differentiable.

    hidden_MD: hidden states that precede the targets. targets_M: token ids. logits: hidden states to logits.
    The backward pass recomputes all chunks but the last few: what is kept does not grow with the batch.
    """
    if _can_fuse(logits, hidden_MD):
        return _fused_logprobs(hidden_MD, targets_M, logits.module)
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    pieces = list(zip(hidden_MD.split(rows), targets_M.split(rows), strict=True))
    recomputed = max(0, len(pieces) - KEPT_CHUNKS) if torch.is_grad_enabled() else 0
    return torch.cat(
        [checkpoint(_chunk_logprobs, *piece, logits, use_reentrant=False) for piece in pieces[:recomputed]]
        + [_chunk_logprobs(*piece, logits) for piece in pieces[recomputed:]]
    )


def gather_logprobs(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """log softmax(logits)[target] for each row, at least float32, never above 0."""
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return -nn.functional.cross_entropy(logits_MV, targets_M, reduction="none")


def _chunk_logprobs(hidden_MD: Tensor, targets_M: Tensor, logits: LogitTransform) -> Tensor:
    return gather_logprobs(logits(hidden_MD), targets_M)


@cache
def fused_obstacle(device: torch.device) -> str | None:
    """Why Liger Kernel cannot compute log-probs on this device; None = it can."""
    if device.type != "cuda":
        return "no CUDA GPU"
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _LIGER:
        return f"liger-kernel {version} gives wrong gradients token by token; {'.'.join(map(str, _LIGER))} does not"
    return triton_obstacle()


def _can_fuse(logits: LogitTransform, hidden_MD: Tensor) -> TypeGuard[PlainHead]:
    """Whether these are logits, in a precision, that the fused kernel computes, and some."""
    if not isinstance(logits, PlainHead) or not _is_bare_linear(logits.module):
        return False
    return len(hidden_MD) > 0 and hidden_MD.dtype != torch.float64 and fused_obstacle(hidden_MD.device) is None


def _is_bare_linear(module: nn.Module) -> bool:
    """Whether a module is weight and bias alone: no adapter, quantization, hook or other forward on top of them."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in hooks)
    )


def _fused_logprobs(hidden_MD: Tensor, targets_M: Tensor, linear: Any) -> Tensor:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    kind = hidden_MD.device.type
    tensors: list[Any] = [hidden_MD, linear.weight, linear.bias]
    if torch.is_autocast_enabled(kind):
        # Once for all chunks; left to autocast, every chunk would cast the whole weight again.
        dtype = torch.get_autocast_dtype(kind)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    states_MD, weight_VD, bias_V = tensors
    # Triton launches on the current device, wherever its arguments are.
    with torch.cuda.device_of(hidden_MD):
        return -liger_fused_linear_cross_entropy(
            states_MD, weight_VD, targets_M, bias_V, reduction="none", accum_dtype=torch.float32
        )


def find_head(model: Any) -> LogitTransform | None:
    """The function from the base model's hidden states to the model's logits; None where no known one fits.

    The choice is made once per model, by comparing with the model's own logits on a few tokens.
    """
    make = head_maker(model)
    return None if make is None else make(model)


def head_maker(model: Any) -> Callable[[Any], LogitTransform] | None:
    """What makes `find_head`'s function from this model, or from a copy of it; None where no known one fits."""
    if model.base_model is model or model.get_output_embeddings() is None:
        return None
    if model not in _heads:
        _heads[model] = next((make for make in _candidates(model) if _fits(model, make(model))), None)
    return _heads[model]


def _candidates(model: Any) -> Iterator[Callable[[Any], LogitTransform]]:
    """What the config suggests, the likeliest first: factors multiply or divide, and a model may ignore its config."""
    config = model.config.get_text_config()
    cap = _first(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    factor = _first(config, "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    scales: list[LogitTransform] = [_unchanged]
    if factor is not None:
        scales = [lambda logits: logits * factor, lambda logits: logits / factor, *scales]
    caps: list[LogitTransform] = [_unchanged]
    if cap is not None:
        caps = [lambda logits: torch.tanh(logits / cap) * cap, *caps]
    for scaled, capped in product(scales, caps):
        yield lambda model, scaled=scaled, capped=capped: _composed(model.get_output_embeddings(), scaled, capped)


def _composed(head: nn.Module, scaled: LogitTransform, capped: LogitTransform) -> LogitTransform:
    if scaled is capped is _unchanged:
        return PlainHead(head)
    return lambda hidden_MD: capped(scaled(head(hidden_MD)))


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _first(config: Any, *names: str) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _fits(model: Any, logits: LogitTransform) -> bool:
    """Whether these are the model's own logits: it is given hidden states of every size on their way into its head."""
    # The weight, as PEFT's layers have it too; num_embeddings they do not have.
    embeddings_VD, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    ids = torch.arange(len(_PROBE_LOGITS), device=embeddings_VD.device)[None] % len(embeddings_VD)
    taken: list[Tensor] = []
    with probing(model):
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return False
        sizes = torch.tensor(_PROBE_LOGITS, dtype=hidden.dtype, device=hidden.device)[None, :, None]
        resized = hidden * (sizes / head(hidden).abs().amax(-1, keepdim=True))

        def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            taken.append(args[0])
            return (resized, *args[1:])

        hook = head.register_forward_pre_hook(replace)
        try:
            own = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return len(taken) == 1 and _close(taken[0], hidden) and _close(logits(resized), own)


def _close(ours: Tensor, own: Tensor) -> bool:
    if ours.shape != own.shape:
        return False
    error = (ours.float() - own.float()).abs().amax(-1)
    return bool((error <= _PROBE_TOLERANCE * own.float().abs().amax(-1)).all())
