"""LoRA adapters: is one all that trains, does it add anything, and the model without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def sole_lora_layers(model: Any) -> list[Any]:
    """The layers of a PEFT model whose one plain LoRA adapter is all that trains: without it, the model is its base.

    Empty for anything else, and in any doubt: several adapters, further trained parameters, variants such as DoRA,
    layer types that compute in other ways, an adapter that is merged or switched off.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "LORA" or len(model.peft_config) != 1:
        return []
    if config.bias != "none" or config.modules_to_save or getattr(config, "trainable_token_indices", None):
        return []
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = list(model.peft_config)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if type(layer) not in (Linear, Embedding) or layer.lora_variant or layer.merged or layer.disable_adapters:
            return []
        if list(layer.active_adapters) != names:
            return []
    adapter = {id(p) for layer in layers for part in _parts(layer) for p in part.parameters()}
    return layers if all(id(p) in adapter for p in model.parameters() if p.requires_grad) else []


def adds_nothing(layers: list[Any]) -> bool:
    """Whether these LoRA layers give bit for bit what their base layers give: x + 0 is x."""
    return all(_adds_nothing(layer) for layer in layers)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base model inside the block; the adapter, and what of the model is trained, are as before afterwards."""
    # peft freezes the adapter when it switches it off, and trains all of it when it switches it on.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _parts(layer: Any) -> list[nn.Module]:
    return [layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B]


def _adds_nothing(layer: Any) -> bool:
    # The factor that starts at zero is B in most layers, and A in embeddings. Zero times infinity would not be zero.
    first, second, embedding_first, embedding_second = ([*part.parameters()] for part in _parts(layer))
    halves = [values for values in (first + embedding_first, second + embedding_second) if values]
    finite = all(bool(torch.isfinite(value).all()) for values in halves for value in values)
    return finite and any(all(not value.any() for value in values) for values in halves)
