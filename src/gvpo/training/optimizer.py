"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from gvpo.errors import UserError
from gvpo.training.config import GVPOConfig


def make_optimizer(module: nn.Module, config: GVPOConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; weight decay on matrices only.

    Raises UserError if nothing does, or if weights that are to be trained are in half precision: their small updates
    would be rounded away.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("the model has no parameter that requires a gradient; unfreeze some, or add an adapter")
    half = next((p.dtype for p in parameters if p.dtype in (torch.bfloat16, torch.float16)), None)
    if half is not None:
        raise UserError(
            f"the model's trainable weights are {half}, in which most updates are rounded away; give a float32 model "
            "(model.float()), and set bf16 for autocast over it"
        )
    decayed = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay}
    others = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [group for group in (decayed, others) if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def make_schedule(optimizer: torch.optim.Optimizer, config: GVPOConfig, updates: int) -> LambdaLR:
    """The schedule of transformers that the config names, over this many updates."""
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, num_training_steps=updates)
    assert isinstance(schedule, LambdaLR)
    return schedule
