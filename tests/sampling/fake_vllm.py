"""A stand-in for the parts of vLLM that are used, over a model of transformers: same calls, same refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo.sampling import SamplingParams as Params
from gvpo.sampling import TorchSampler


@dataclass
class SamplingParams:
    """vllm.SamplingParams: the fields that are used, under its names and defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")


class Engines(nn.Module):
    """vLLM's own model: other parameters than the policy's, loaded under the checkpoint's names."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        self.received: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.received.append(name)
            with torch.no_grad():
                self.inner.get_parameter(name).copy_(tensor)
        return {f"inner.{name}" for name in self.received}


@dataclass
class LLM:
    """vllm.LLM. calls: what it was told, in order. Asleep at level 2, its weights are NaN."""

    model: str
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_sleep_mode: bool = False
    distributed_executor_backend: str | None = None
    tensor_parallel_size: int = 1
    seed: int = 0
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)  # as vLLM does, for everybody in the process
        self.engines = Engines(self.model)
        self.model_config = SimpleNamespace(max_model_len=self.max_model_len or 64)
        self._discard()
        self.awake = {"weights", "kv_cache"}

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}, "asked in its sleep"
        self.calls.append(f"generate {len(prompts)}")
        return [
            SimpleNamespace(outputs=self._answers(prompt["prompt_token_ids"], params))
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answers(self, prompt: list[int], params: SamplingParams) -> list[Any]:
        assert params.max_tokens is not None and params.seed is not None and params.ignore_eos
        assert params.seed >= -(2**63) and params.seed + params.n < 2**63, "no seed for torch"
        sampler = TorchSampler(self.engines.inner, params.stop_token_ids or [])
        how = Params(params.max_tokens, params.temperature, params.top_p, params.top_k)
        seeds = [params.seed + member for member in range(params.n)]
        drawn = sampler.sample([prompt] * params.n, 1, how, seeds=seeds)
        return [SimpleNamespace(token_ids=tuple(one.token_ids)) for [one] in drawn]

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        assert "weights" in self.awake, "weights written in its sleep"
        self.calls.append("load")
        return [func(self.engines)]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset")
        return True

    def sleep(self, level: int = 1) -> None:
        assert self.enable_sleep_mode
        self.calls.append(f"sleep {level}")
        self.awake = set()
        if level == 2:
            self._discard()

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {' '.join(tags or [])}")
        self.awake |= set(tags or ["weights", "kv_cache"])

    def _discard(self) -> None:
        for parameter in self.engines.parameters():
            parameter.data.fill_(torch.nan)
