"""vLLM as the sampler: an engine in this process that sleeps while the policy trains, or a server.

Covered: causal language models that vLLM knows, on CUDA, the policy's weights whole in this process, one engine a
process; a server of any size, through TRL's client. Not covered: tensor parallelism inside the training processes,
quantized engines, images, log-probs (nobody asks for them). vLLM is imported when an engine is made.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import nn

from gvpo.errors import UserError
from gvpo.models.modes import computes_bfloat16
from gvpo.sampling.policy_weights import Named, policy_weights
from gvpo.sampling.sampler import Sample, SamplingParams, check_request

_GREEDY = 1e-5  # temperatures below are 0 to vLLM, which then refuses to draw several
_SERVER_TIMEOUT = 240.0
_CONCURRENT_REQUESTS = 64  # as many as TRL's client keeps connections


@dataclass(frozen=True, slots=True)
class Request:
    """`count` completions of a prompt; they differ by the seed, to which vLLM adds each one's number."""

    prompt: list[int]
    count: int
    seed: int


class Engine(Protocol):
    """vLLM, wherever it is. max_length: the most tokens of a prompt with its completion."""

    max_length: int

    def generate(self, requests: Sequence[Request], how: dict[str, Any]) -> list[list[list[int]]]:
        """Token ids of every completion, by request; `how`: what all requests share, under vLLM's names."""
        ...

    def sync(self) -> None:
        """Take the policy's weights as they are now."""
        ...


class VLLMSampler:
    """Draws completions with vLLM from the weights that the policy had at the last `sync`.

    `end_token_ids`: a completion ends with the first of them; none = every completion is truncated. What a model's own
    generation config ends with plays no part.
    """

    def __init__(self, engine: Engine, end_token_ids: Collection[int]) -> None:
        self.engine = engine
        self.end_token_ids = frozenset(end_token_ids)

    def sync(self) -> None:
        """Take the policy's weights as they are now; every process of a run must call it."""
        self.engine.sync()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """Draw `num_generations` completions of every prompt: see `Sampler.sample`.

        At temperature 0 one is computed, and all members are it. Raises UserError for an empty prompt, counts that do
        not match, lengths beyond the engine's, or a server that ends completions by itself.
        """
        self._check(prompts, num_generations, params, seeds)
        if not prompts:
            return []
        greedy = params.temperature < _GREEDY
        count = 1 if greedy else num_generations
        requests = [Request(list(prompt), count, _seed(seed)) for prompt, seed in zip(prompts, seeds, strict=True)]
        drawn = self.engine.generate(requests, _shared(params, self.end_token_ids))
        return [
            [self._sample(token_ids, params) for token_ids in (members * num_generations if greedy else members)]
            for members in drawn
        ]

    def _sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sample:
        ended = bool(token_ids) and token_ids[-1] in self.end_token_ids
        if not ended and len(token_ids) != params.max_new_tokens:
            raise UserError(
                f"vLLM ended a completion after {len(token_ids)} of {params.max_new_tokens} tokens, by a rule of its "
                "own; start the server with --generation-config vllm"
            )
        return Sample(list(token_ids), truncated=not ended)

    def _check(
        self, prompts: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, seeds: Sequence[int]
    ) -> None:
        check_request(prompts, num_generations, seeds)
        for index, prompt in enumerate(prompts):
            if (total := len(prompt) + params.max_new_tokens) > self.engine.max_length:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, with max_new_tokens={params.max_new_tokens} that makes "
                    f"{total}, more than the {self.engine.max_length} of the vLLM engine: shorten the prompt, lower "
                    "max_new_tokens, or raise vllm_max_model_length"
                )


def check_vllm(*, server: bool) -> None:
    """Raise UserError where vLLM cannot be had here: packages, or a CUDA device, are missing."""
    for package in ("vllm", "trl") if server else ("vllm",):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'use_vllm: the {package} package is not installed; pip install "gvpo[vllm]"')
    if not torch.cuda.is_available():
        raise UserError("use_vllm: there is no CUDA device here; leave use_vllm off to sample with the model itself")


class Colocated:
    """An engine in this process, beside the policy on its device.

    memory: the share of the device's memory that it takes, weights and cache. sleeps: whether it gives that back
    between rollouts; its weights are then sent again whenever it wakes. max_length: None = the model's. dtype: of its
    weights, as vLLM calls it; None = bfloat16 where the device has it, else float16.
    Raises UserError as check_vllm does, and where vLLM's model has weights that the policy does not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: float = 0.3,
        sleeps: bool = False,
        max_length: int | None = None,
        dtype: str | None = None,
    ) -> None:
        check_vllm(server=False)
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.model = model
        self._sleeps = sleeps
        self._loaded = False
        self._config = TemporaryDirectory(prefix="gvpo-vllm-")
        _write_config(model, self._config.name)
        _name_this_process(_device(model))
        # The policy itself is where the weights come from, so none are read; prefix caching is on where vLLM has it.
        self.llm: Any = LLM(
            model=self._config.name,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype or ("bfloat16" if computes_bfloat16(torch.device("cuda")) else "float16"),
            max_model_len=max_length,
            gpu_memory_utilization=memory,
            enable_sleep_mode=sleeps,
            # In this process, one engine for each: their weights can be reached, and torchrun's variables are read.
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=1,
            seed=0,
        )
        self.max_length = int(self.llm.model_config.max_model_len)
        if sleeps:
            self.llm.sleep(level=2)

    def sync(self) -> None:
        """Wake the weights if they sleep, and take the policy's."""
        if self._sleeps and not self._loaded:
            # What the update has freed must be given back to the driver first.
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(lambda engines: load_weights(engines, policy_weights(self.model)))
        self.llm.reset_prefix_cache()
        self._loaded = True

    def generate(self, requests: Sequence[Request], how: dict[str, Any]) -> list[list[list[int]]]:
        """Wake the cache too, draw, and sleep again."""
        from vllm import SamplingParams as VLLMParams  # pyright: ignore[reportMissingImports]

        if not self._loaded:  # asked again without a sync between: the weights are gone, and the policy's are the same
            self.sync()
        if self._sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [VLLMParams(n=one.count, seed=one.seed, detokenize=False, **how) for one in requests]
        # The caller's autocast is meant for the policy: vLLM's layers choose their own precision.
        with torch.autocast(_device(self.model).type, enabled=False):
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        if self._sleeps:
            self.llm.sleep(level=2)
            self._loaded = False
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def load_weights(engines: Any, weights: Iterable[Named]) -> None:
    """Load weights into vLLM's own model. Raises UserError where one of its weights is not among them."""
    loaded = engines.load_weights(weights)
    # Some models do not say what they have loaded.
    missing = set() if loaded is None else {name for name, _ in engines.named_parameters()} - set(loaded)
    if missing:
        raise UserError(
            f"vLLM's {type(engines).__name__} has {len(missing)} weights that the policy does not, the first is "
            f"{min(missing)}; leave use_vllm off for this model"
        )


class Server:
    """A vLLM server that TRL's client talks to; each process asks for its own prompts, the main one sends weights.

    base_url: such as http://localhost:8000. is_main: whether this process is the one that sends; wait: until every
    process is here. Raises UserError as check_vllm does, and where no server answers, or not one that takes weights.
    """

    def __init__(
        self,
        model: nn.Module,
        base_url: str,
        *,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
        timeout: float = _SERVER_TIMEOUT,
    ) -> None:
        check_vllm(server=True)
        from trl.generation.vllm_client import VLLMClient

        self.model, self._is_main, self._wait = model, is_main, wait
        # requests' errors are OSErrors; a server without its development endpoints is a RuntimeError of the client's.
        try:
            self.client: Any = VLLMClient(base_url=base_url, connection_timeout=timeout)
            self.max_length = int(self.client.get_server_info()["model_config"]["max_model_len"])
            if is_main:
                self.client.init_communicator(device=_device(model))
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"vllm_server_base_url {base_url!r}: {reason}") from error

    def sync(self) -> None:
        """Send the policy's weights, while nobody draws."""
        self._wait()
        if self._is_main:
            # Names and shapes are announced before the first tensor, so the weights are gone through twice.
            metadata = [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in self._weights()]
            self.client.update_named_params(metadata, self._weights())
            self.client.reset_prefix_cache()
        self._wait()

    def _weights(self) -> Iterable[Named]:
        return policy_weights(self.model)

    def generate(self, requests: Sequence[Request], how: dict[str, Any]) -> list[list[list[int]]]:
        """Ask for every prompt by itself: one call to the server has one seed."""
        shared = {name: how[name] for name in ("temperature", "top_p", "top_k", "max_tokens")}
        rest = {name: value for name, value in how.items() if name not in shared}

        def ask(one: Request) -> list[list[int]]:
            extra = {"seed": one.seed, **rest}
            output = self.client.generate([one.prompt], n=one.count, logprobs=None, generation_kwargs=extra, **shared)
            return output["completion_ids"]

        with ThreadPoolExecutor(min(_CONCURRENT_REQUESTS, len(requests))) as pool:
            return list(pool.map(ask, requests))


def _shared(params: SamplingParams, end_token_ids: Collection[int]) -> dict[str, Any]:
    """What all requests of a call share, in vLLM's words."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        # A completion ends with one of these, and with nothing that the model's own config names.
        "stop_token_ids": sorted(end_token_ids),
        "ignore_eos": True,
    }


def _seed(seed: int) -> int:
    """A seed that vLLM takes, its members' numbers added: hashed, so that prompts whose seeds differ by 1 differ."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little") >> 2


def _write_config(model: Any, folder: str) -> None:
    """The model's config.json, which says of what make it is: all that vLLM needs beside the weights."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _name_this_process(device: torch.device) -> None:
    """What torchrun tells its processes, and vLLM asks for, where this one was started without it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(device.index or 0), "MASTER_ADDR": "localhost"}
        for name, value in {**told, "MASTER_PORT": str(free.getsockname()[1])}.items():
            os.environ.setdefault(name, value)
