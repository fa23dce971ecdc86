"""verl on a CPU, for tests: a platform, and a rollout engine of Hugging Face models. Registered by importing.

verl ships neither: VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda VERL_USE_EXTERNAL_MODULES=verl_on_cpu switch them on.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase

ROLLOUT = "hugging_face"


_ANSWERS = {
    "get_device_name": "CPU",
    "mem_get_info": (2**34, 2**34),
    **dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"), 0),
    **dict.fromkeys(("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize")),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state")),
}


class _CPU(ModuleType):
    """torch.cpu, and what verl asks of torch.cuda beside it, which on a CPU is nothing."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name in _ANSWERS:
            return lambda *args, **named: _ANSWERS[name]
        raise AttributeError(name)


@platform_manager.PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    device_name = vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _CPU("cpu"))

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return int(os.environ.get("WORLD_SIZE", 1))

    def communication_backend_name(self):
        # verl joins "cpu:gloo" and "<device>:<backend>", which torch refuses where both are the CPU: the group is made
        # here, before it asks.
        if "RANK" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_id=0):
        return None, None

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False

    @contextmanager
    def nvtx_range(self, message):
        yield

    def _nothing(self, *args, **named):
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing


platform_manager.set_platform(CPUPlatform())
# A reference model's weights are offloaded to pinned memory, which torch has beside an accelerator only.
torch.Tensor.pin_memory = lambda self, *args, **named: self
