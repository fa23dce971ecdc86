"""accelerate, started for one run: devices, mixed precision, data-parallel wrappers, trackers."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from gvpo.errors import UserError
from gvpo.training.config import GVPOConfig


def start_accelerate(config: GVPOConfig) -> Accelerator:
    """The Accelerator of a run. Raises UserError where it was configured for sharded weights."""
    from accelerate.state import AcceleratorState

    # accelerate keeps one state per process, and refuses a second trainer with another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Without it, accelerate takes processes on CPUs for one each.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if config.bf16 else "no",
        log_with=[*config.trackers] or None,
        project_dir=config.output_dir,
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate was configured for {kind.value}, whose sharded weights are not supported; launch with "
            "torchrun, or with accelerate's plain data-parallel mode"
        )
    return accelerator
