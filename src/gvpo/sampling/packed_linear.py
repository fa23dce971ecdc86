"""Linear layers whose weights lie as the processor's matrix products read them.

A product puts the weights in that order first, which for the few rows of a decoding step takes as long as the product:
here it is done once. The operators are those that torch.compile calls for frozen weights on x86 (oneDNN); where a build
of torch has none, layers stay as they are.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 64
"""For how many rows the order is chosen; any number can be multiplied."""


def pack_linears(model: nn.Module) -> None:
    """Replace every plain linear layer on the CPU, in float32 or bfloat16, in place; they then only compute."""
    if not _can_pack():
        return
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and _is_packable(layer.weight):
                setattr(parent, name, PackedLinear(layer))


class PackedLinear(nn.Module):
    """A linear layer, for inputs of its weights' dtype, outside autocast and without gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """As the layer had it: (outputs, inputs)."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (..., inputs) to (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


def _can_pack() -> bool:
    operators: Any = torch.ops.mkldnn
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return x86 and torch.backends.mkldnn.is_available() and all(hasattr(operators, name) for name in names)


def _is_packable(weight: Tensor) -> bool:
    operators: Any = torch.ops.mkldnn
    bfloat16 = weight.dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and (weight.dtype == torch.float32 or bfloat16)
