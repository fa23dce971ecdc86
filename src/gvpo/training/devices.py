"""accelerate, started for one run: devices, mixed precision, data-parallel wrappers, trackers."""

from __future__ import annotations

import ctypes
import platform

from accelerate import Accelerator
from accelerate.utils import DistributedType

from gvpo.errors import UserError
from gvpo.models.modes import run_device
from gvpo.training.config import GVPOConfig


def start_accelerate(config: GVPOConfig) -> Accelerator:
    """The Accelerator of a run. Raises UserError where it was configured for sharded weights."""
    from accelerate.state import AcceleratorState

    # accelerate keeps one state per process, and refuses a second trainer with another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Without it, accelerate takes processes on CPUs for one each.
        cpu=run_device().type == "cpu",
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
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the next ones, instead of handing it back to the system.

    Every batch would otherwise have its activations' pages mapped and cleared anew: a tenth to a third of an update's
    time. The price is memory, where batches have many shapes and leave holes (docs/performance.md). glibc alone;
    elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold, most = -3, -1, 2**31 - 1  # malloc.h
    libc = ctypes.CDLL(None)
    for name in (mmap_threshold, trim_threshold):
        assert libc.mallopt(name, most) == 1
