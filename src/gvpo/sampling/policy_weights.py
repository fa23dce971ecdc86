"""A policy's weights as a checkpoint of it would hold them: under those names, tied ones once, adapters merged.

Covered: models of transformers, PEFT adapters that can be merged. Not covered: weights sharded over processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gvpo.errors import UserError

Named = tuple[str, Tensor]


@torch.no_grad()
def policy_weights(model: Any) -> Iterator[Named]:
    """Every parameter and persistent buffer of a model, once, under its checkpoint's name; nothing of it is changed.

    Made on the way: one merged layer, or one decoder layer where the checkpoint's names are others than the module's.
    Raises UserError for an adapter that cannot be merged.
    """
    from transformers.core_model_loading import revert_weight_conversion

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = _own(base) if base is model else _merged(model, base)
    # Experts are one tensor in the module and many in the files: what is put together there is in one decoder layer.
    for _, part in groupby(named, lambda one: _decoder_layer(one[0])):
        yield from revert_weight_conversion(base, dict(part)).items()


def _decoder_layer(name: str) -> str | None:
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else None


def _own(model: Any) -> Iterator[Named]:
    """Parameters, tied ones once, and the buffers that are saved with them."""
    saved = model.state_dict(keep_vars=True).keys()
    yield from ((name, parameter.data) for name, parameter in model.named_parameters())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _merged(model: Any, base: Any) -> Iterator[Named]:
    """What `base` would own without its adapter, which is added to the weights; these stay as they are to the bit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    _check_mergeable(model, base)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    adapters = tuple(f".{name}." for layer in layers.values() for name in layer.adapter_layer_names)
    chosen = f".modules_to_save.{model.active_adapter}."
    with torch.autocast(next(base.parameters()).device.type, enabled=False):
        for name, tensor in _own(base):
            layer, found, rest = name.partition(".base_layer.")
            if found and layer in layers:
                yield f"{layer}.{rest}", _merge(layers[layer], rest)
            elif ".original_module." not in name and not any(part in f"{name}." for part in adapters):
                yield name.replace(chosen, "."), tensor


def _merge(layer: Any, name: str) -> Tensor:
    """One weight of a layer with its adapter added, on copies: taking it off again would leave rounding errors."""
    kept = [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.clone()
        layer.merge()
        merged = layer.get_base_layer().get_parameter(name).data
        for parameter, _ in kept:
            parameter.data = parameter.data.clone()
        layer.unmerge()
    finally:
        for parameter, data in kept:
            parameter.data = data
    return merged


def _check_mergeable(model: Any, base: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model.active_peft_config.is_prompt_learning:
        raise UserError("vLLM cannot draw from a prompt-learning PEFT model: use LoRA, or merge it")
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if getattr(base.config, "tie_word_embeddings", False) and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise UserError(
            "an adapter on one of two tied embeddings cannot be merged for vLLM: leave embed_tokens and lm_head out of "
            "target_modules, or untie them"
        )
