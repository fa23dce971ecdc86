"""Which sampler a run draws with: the embedded one, or vLLM."""

from __future__ import annotations

from typing import Any

from gvpo.models.encoding import end_token_ids
from gvpo.sampling.sampler import PolicySampler
from gvpo.sampling.torch_sampler import make_torch_sampler
from gvpo.sampling.vllm_sampler import Colocated, Engine, Server, VLLMSampler, check_vllm
from gvpo.training.config import GVPOConfig
from gvpo.training.processes import current_processes
from gvpo.training.random_state import RandomState


def check_sampler(config: GVPOConfig) -> None:
    """Raise UserError where this machine lacks what the config's sampler needs; no weights are read."""
    if config.use_vllm:
        check_vllm(server=config.vllm_mode == "server")


def make_sampler(config: GVPOConfig, model: Any, tokenizer: Any | None) -> PolicySampler:
    """The sampler of a run, on the model's device. Raises UserError where vLLM cannot be had."""
    if not config.use_vllm:
        return make_torch_sampler(model, tokenizer, config.rollout_dtype)
    state = RandomState.now()
    sampler = VLLMSampler(_engine(config, model), end_token_ids(model, tokenizer))
    # An engine that starts in this process seeds everybody's generators.
    state.restore()
    return sampler


def _engine(config: GVPOConfig, model: Any) -> Engine:
    if config.vllm_mode == "server":
        processes = current_processes()
        url = str(config.vllm_server_base_url)
        return Server(model, url, is_main=processes.is_main, wait=processes.wait)
    return Colocated(
        model,
        memory=config.vllm_gpu_memory_utilization,
        sleeps=config.vllm_enable_sleep_mode,
        max_length=config.vllm_max_model_length,
        dtype=None if config.rollout_dtype == "auto" else config.rollout_dtype,
    )
