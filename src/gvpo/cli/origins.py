"""Where an evaluation's completions come from: a model on this machine, a server, or a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo.errors import UserError
from gvpo.training.config import ConfigError, GVPOConfig

if TYPE_CHECKING:
    from gvpo.evaluation.suite import EvalTask
    from gvpo.sampling.sampler import SamplingParams
    from gvpo.sources.source import Source

KEY = "OPENAI_API_KEY"
"""Environment variable with a server's key."""

TAIL = 2**20


@dataclass(frozen=True)
class Opened:
    """Ready to draw. template: the one that was asked for, else what suits; tokenizer: None where texts come."""

    template: str
    tokenizer: Any | None
    source: Callable[[SamplingParams], Source]


@dataclass(frozen=True)
class Origin:
    """settings: what completions depend on beside prompts and sampling. open: loads what is heavy."""

    settings: dict[str, Any]
    open: Callable[[Sequence[EvalTask], str | None], Opened]


def local_origin(model: str, *, rollout_dtype: str, use_vllm: bool) -> Origin:
    """A model on this machine, checked as far as that needs no weights. Raises UserError."""
    from gvpo.models.loading import check_model
    from gvpo.training.samplers import check_sampler

    config = _config(rollout_dtype=rollout_dtype, use_vllm=use_vllm, token_budget=None)
    check_model(model)
    check_sampler(config)
    name = str(Path(model))  # the same with and without a / at the end
    settings = {"model": name, "weights": weights_digest(Path(model))}
    settings |= {"rollout_dtype": rollout_dtype, "use_vllm": use_vllm}
    return Origin(settings, lambda tasks, template: _load(name, config, tasks, template))


def server_origin(url: str, model: str) -> Origin:
    """A model that an OpenAI-compatible server calls `model`. Raises UserError for what is no URL."""
    from gvpo.sampling.sampler import SamplingParams
    from gvpo.sources.server import ServerSource

    def source(params: SamplingParams) -> ServerSource:
        return ServerSource(url, model, params, api_key=os.environ.get(KEY))

    source(SamplingParams(1))
    return Origin({"model": model, "server": url}, lambda tasks, template: Opened(template or "chat", None, source))


def given_origin(file: str, source: Source) -> Origin:
    """Completions of a file. Raises UserError where it cannot be read."""
    content = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    settings = {"completions": file, "completions_digest": content}
    return Origin(settings, lambda tasks, template: Opened(template or "plain", None, lambda params: source))


def weights_digest(model: Path) -> str | None:
    """What tells the weights in a folder or file from those that a later training puts there; None elsewhere.

    Names, sizes, and the last MiB of each file: training changes all weights.
    """
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model] if model.is_file() else []
    state = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            state.update(f"{path.name} {size} ".encode() + file.read())
    return state.hexdigest() if files else None


def _config(**values: Any) -> GVPOConfig:
    try:
        return GVPOConfig(**values)
    except ConfigError as error:
        raise UserError(f"--{error.field}: {error.problem}") from error


def _load(name: str, config: GVPOConfig, tasks: Sequence[EvalTask], template: str | None) -> Opened:
    from gvpo.models.loading import load_model
    from gvpo.models.modes import run_device
    from gvpo.sources.policy import PolicySource
    from gvpo.training.data_checks import check_prompts
    from gvpo.training.devices import keep_freed_memory
    from gvpo.training.samplers import make_sampler

    place = run_device()
    if place.type == "cpu":
        keep_freed_memory()
    model, tokenizer = load_model(name, device=place)
    chosen = template or ("chat" if getattr(tokenizer, "chat_template", None) else "qwen-math-raw")
    for task in tasks:
        length = config.model_copy(update={"max_completion_length": task.params.max_new_tokens})
        check_prompts(task.rows(chosen), [], tokenizer, model, length)
    sampler = make_sampler(config, model, tokenizer)
    sampler.sync()
    return Opened(chosen, tokenizer, lambda params: PolicySource(sampler, tokenizer, params))
