"""Train and evaluation mode, restored exactly; what a processor can do."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gvpo.errors import UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own flag is back afterwards, whatever happens.

    Layers that were compiled run as they were written: lengths and caches would have them compiled over and over.
    """
    before = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    model.eval()
    for module, _, compiled in before:
        if compiled is not None:
            module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training, compiled in before:
            module.training = training
            if compiled is not None:
                module._compiled_call_impl = compiled


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no graph, and the model's own precision, whatever autocast the caller is in."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def run_device() -> torch.device:
    """Where a run on this machine goes: the accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # MPS has no float64, which losses are taken in.
    return torch.device("cpu") if found is None or found.type == "mps" else found


def computes_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the processor's own, and so faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private, and on CPUs the only ones to ask.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


def triton_obstacle() -> str | None:
    """Why Triton's kernels cannot be compiled for a GPU here; None = they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "no C compiler, which triton needs"


def enable_checkpointing(model: Any) -> None:
    """Have the model recompute its activations in the backward pass."""
    # The name of today, and the one of before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def compiled_layers(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Inside the block, the model's layers run as torch.compile makes them, at their first pass; but see `evaluating`.

    Numbers change by rounding. Raises UserError where the model does not name its layers, or where nothing can be
    compiled for its device.
    """
    if not enabled:
        yield
        return
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [(module, module._compiled_call_impl) for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"torch_compile: {type(model).__name__} does not name its layers; train without it")
    _check_compiler(next(model.parameters()).device)
    import torch._dynamo.config

    # Layers share their code, and whoever else has it compiled counts towards one limit.
    with torch._dynamo.config.patch(recompile_limit=64):
        try:
            for layer, _ in layers:
                # Lengths differ from batch to batch.
                layer.compile(dynamic=True)
            yield
        finally:
            for layer, before in layers:
                layer._compiled_call_impl = before


def _check_compiler(device: torch.device) -> None:
    """Compile something: whether a compiler is there says little about whether it works."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:
        said = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise UserError(f"torch_compile: nothing can be compiled for {device.type} here: {said}") from error


def recomputes(model: nn.Module) -> bool:
    """Whether some of the model's layers recompute their activations in the backward pass."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate in the model to 0: dropout modules, and the rates that attention layers keep themselves.

    Train mode stays, so that gradient checkpointing and the like go on working. The config is not touched.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
