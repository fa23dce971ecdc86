"""Runs of `python -m verl.trainer.main_ppo` on the CPUs of this machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

MACHINE = """
data.dataloader_num_workers=0
actor_rollout_ref.model.use_remove_padding=False
+actor_rollout_ref.model.override_config.attn_implementation=eager
actor_rollout_ref.actor.strategy=fsdp2
actor_rollout_ref.actor.use_torch_compile=False
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
++actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
++actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype=fp32
actor_rollout_ref.rollout.name=hugging_face
actor_rollout_ref.rollout.tensor_model_parallel_size=1
actor_rollout_ref.rollout.agent.num_workers=1
actor_rollout_ref.rollout.calculate_log_probs=True
reward.num_workers=1
transfer_queue.backend.SimpleStorage.num_data_storage_units=1
trainer.device=cpu
ray_kwargs.ray_init.num_cpus=32
+ray_kwargs.ray_init.include_dashboard=False
"""
"""What no run on a GPU needs; every name is verl's own."""

_METRIC = re.compile(r"([\w/]+):(?:np\.float64\()?(-?[\d.]+(?:e-?\d+)?|nan)")
"""As verl's console logger writes one."""


def steps_of(command: Sequence[str | Path], environment: Mapping[str, str], folder: Path) -> list[dict[str, float]]:
    """Run it in this folder, which gets its log. Returns the metrics of its steps."""
    whole = [*command, *MACHINE.split()]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=560, cwd=folder)
    log = done.stdout + done.stderr
    (folder / "log").write_text(log, encoding="utf-8")
    assert done.returncode == 0, log[-4000:]
    lines = [_METRIC.findall(line) for line in re.findall(r"step:\d+ - .*", log)]
    return [{name: float(value) for name, value in line} for line in lines]
