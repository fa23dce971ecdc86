"""What a run is: every knob, its default, its bounds, and the combinations that cannot be."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gvpo.errors import UserError
from gvpo.rewards.limits import Limits
from gvpo.sources.specs import PositiveInt, Spec, first_problem, read_sources

Objectives = Literal[
    "gvpo",
    "gvpo_no_cov",
    "gvpo_no_var",
    "gvpo_no_cov_var",
    "reinforce",
    "rloo",
    "grpo",
    "dr_grpo",
    "dpo",
    "ipo",
    "rebel",
    "kimi_pmd",
]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
]


class ConfigError(UserError):
    """A wrong value in a config; `field` is its name, None for a combination of several; `problem` the rest."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(f"config: {problem}" if field is None else f"config, field {field!r}: {problem}")
        self.field = field
        self.problem = problem


class GVPOConfig(BaseModel):
    """Settings of a training run, under the Hugging Face and TRL names wherever the concept is the same.

    Unknown names, values out of range and impossible combinations raise ConfigError, one line, at construction.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # The objective
    objective: Objectives = Field("gvpo", description="What is minimised.")
    beta: float = Field(
        0.1,
        ge=0,
        description="Weight of the KL term; GVPO's optimum is pi_ref * exp(R / beta). 0 for reinforce, rloo, grpo and "
        "dr_grpo only, where the term is an extra.",
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="Clipping range of probability ratios: rloo, grpo, dr_grpo.")
    reference: str | PositiveInt | None = Field(
        None,
        description="Policy the KL is taken against: 'rollout' (the policy that drew the groups), 'initial', an "
        "integer n (renewed every n rollouts), or the path of a model or of a run's checkpoint. Default: 'rollout' "
        "when sampling, 'initial' when all data is offline.",
    )
    reference_storage: Literal["cpu", "disk"] = Field(
        "cpu", description="Where a snapshot for the reference lives: in host memory, or in a file in the run folder."
    )
    trust_ref_logprobs: bool = Field(
        False,
        description="Use the ref_logprob that data bring, after comparing one batch, instead of scoring anew. For a "
        "fixed reference only.",
    )
    allow_unanchored: bool = Field(
        False, description="Accept a moving reference on offline-only data, where nothing holds the policy back."
    )

    # Rollouts
    num_generations: int = Field(8, ge=2, description="Completions drawn per prompt: k.")
    max_completion_length: PositiveInt = Field(256, description="Most new tokens in a sampled completion.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; log-probs are always taken at 1.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; below 1 the optimum is no longer unique.")
    top_k: int = Field(
        0, ge=0, description="Draw from the k likeliest tokens; 0 = all. Else the optimum is no longer unique."
    )
    rollout_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the weights that completions are drawn with, a copy where it is not theirs; no "
        "log-prob is taken from it. auto: bfloat16 where the processor computes in it.",
    )
    use_vllm: bool = Field(False, description="Draw with vLLM, on a GPU, instead of the model itself.")
    vllm_mode: Literal["server", "colocate"] = Field(
        "colocate", description="vLLM in the training processes, an engine each, or a server of its own."
    )
    vllm_server_base_url: str | None = Field(None, description="The server, such as http://localhost:8000.")
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="Share of each GPU's memory for a colocated engine, its weights included."
    )
    vllm_enable_sleep_mode: bool = Field(
        False, description="A colocated engine gives its memory back to the update between rollouts."
    )
    vllm_max_model_length: PositiveInt | None = Field(
        None, description="Most tokens of a prompt with its completion in a colocated engine. Default: the model's."
    )
    vllm_tensor_parallel_size: PositiveInt = Field(
        1, description="1 only: an engine over several GPUs is a server's, vllm serve --tensor-parallel-size."
    )
    groups_per_update: PositiveInt = Field(8, description="Whole groups in one update, over all processes.")
    updates_per_rollout: PositiveInt = Field(
        2,
        description="Updates that share one rollout of groups_per_update * updates_per_rollout prompts; with 1, beta "
        "only scales the gradient.",
    )
    epochs_per_rollout: PositiveInt = Field(1, description="Passes over each rollout's groups.")

    # The optimizer
    learning_rate: float = Field(1e-5, ge=0, description="Peak learning rate of AdamW.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on weight matrices.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 = off.")
    lr_scheduler_type: Schedule = Field("linear", description="Learning-rate schedule, as in transformers.")
    warmup_steps: int = Field(0, ge=0, description="Updates over which the learning rate rises from 0.")
    max_steps: PositiveInt | None = Field(None, description="Updates in all. Default: num_train_epochs over the data.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the dataset where max_steps is not given.")

    # Scoring
    token_budget: PositiveInt | None = Field(
        2048, description="Most token positions in one forward of an update: bounds memory, never changes the gradient."
    )
    share_prefix: bool = Field(True, description="Compute each prompt once per group, where the model allows it.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory.")
    bf16: bool = Field(False, description="bfloat16 autocast over float32 weights.")
    torch_compile: bool = Field(
        False,
        description="Compile the model's layers, for scores and updates: on CPUs hardly faster, after a first update "
        "that takes longer.",
    )
    disable_dropout: bool = Field(True, description="Set every dropout rate to 0: scoring twice must give the same.")

    # Data
    prompt_column: str = Field("prompt", min_length=1, description="Dataset column that holds the prompt.")
    shuffle_dataset: bool = Field(True, description="Shuffle the prompts anew in every epoch.")
    reward_weights: list[float] | None = Field(None, description="One weight per reward function. Default: all 1.")
    reward_workers: int | None = Field(
        None,
        ge=0,
        description="Processes in which reward functions named by their module run, and can be killed. Default: one a "
        "core; 0: they run in the training process, without a limit.",
    )
    reward_timeout: float = Field(
        30.0, gt=0, description="Seconds that a call in such a process may take; a completion beyond gets no reward."
    )
    reward_memory: float = Field(4.0, gt=0, description="GiB that such a process may hold.")
    seed: int = Field(42, ge=0, description="Seeds the order of the data and every draw.")

    # Logging, evaluation, saving
    output_dir: str | None = Field(None, description="Run folder. Default from Python: none, nothing is written.")
    run_name: str | None = Field(None, description="Name of the run for trackers.")
    logging_steps: PositiveInt = Field(1, description="Updates between two lines in the terminal and the trackers.")
    num_completions_to_print: int = Field(
        0, ge=0, description="Completions of each rollout shown in the terminal; all are kept in the run folder."
    )
    disable_tqdm: bool = Field(False, description="No progress display in the terminal.")
    report_to: str | list[str] = Field(
        "none", description="Trackers, through accelerate: none, tensorboard, wandb, trackio, ..."
    )
    eval_steps: PositiveInt | None = Field(None, description="Updates between evaluations. Default: at the end only.")
    eval_on_start: bool = Field(False, description="Evaluate before the first update too.")
    save_steps: PositiveInt | None = Field(None, description="Updates between two checkpoints. Default: none.")
    publish_steps: PositiveInt | None = Field(
        None,
        description="Updates between two copies of the model in output_dir/policy/, for samplers that follow the run. "
        "Default: none.",
    )
    save_total_limit: PositiveInt | None = Field(None, description="Checkpoints to keep, the newest. Default: all.")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error, type(self)) from error

    @field_validator("reference", mode="before")
    @classmethod
    def _check_reference(cls, value: Any) -> Any:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        if isinstance(value, str) and value.strip():
            # What is nearly a keyword would be looked for on the hub, long after this line.
            near = difflib.get_close_matches(value, ("rollout", "initial"), n=1, cutoff=0.75)
            if near and near[0] != value and "/" not in value:
                raise ValueError(f"did you mean {near[0]!r}? (write a folder of that name as ./{value})")
            return value
        raise ValueError(
            "must be 'rollout', 'initial', an integer from 1 (renewed every n rollouts), or the path of a model or "
            "checkpoint"
        )

    @field_validator("*", mode="before")
    @classmethod
    def _take_plain(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> GVPOConfig:
        if self.beta == 0:
            # Imported here: who reads a config or a help text need not wait for torch.
            from gvpo.objective import OBJECTIVES

            if not OBJECTIVES[self.objective].takes_zero_beta:
                raise ConfigError("beta", f"must be greater than 0 for objective={self.objective!r}, got 0")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError(
                f"lr_scheduler_type='polynomial' ends at 1e-7, not below learning_rate={self.learning_rate}; "
                "use 'linear', or raise learning_rate"
            )
        if self.torch_compile and self.gradient_checkpointing:
            raise ConfigError("torch_compile", "would compile nothing under gradient_checkpointing; use one of the two")
        self._check_vllm()
        return self

    def _check_vllm(self) -> None:
        if self.vllm_tensor_parallel_size > 1:
            raise ConfigError(
                "vllm_tensor_parallel_size",
                f"must be 1, got {self.vllm_tensor_parallel_size}: a colocated engine has the GPU of its process; for "
                "more, start vllm serve --tensor-parallel-size and set vllm_mode: server",
            )
        if not self.use_vllm:
            return
        if self.vllm_mode == "colocate":
            if self.vllm_server_base_url is not None:
                raise ConfigError("vllm_server_base_url", "is for vllm_mode='server'; vllm_mode is 'colocate'")
            return
        if self.vllm_server_base_url is None:
            raise ConfigError("vllm_server_base_url", "must name the server, such as http://localhost:8000")
        for name in ("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "vllm_max_model_length", "rollout_dtype"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(name, "is for vllm_mode='colocate'; give it to the server when you start it")

    @property
    def reward_limits(self) -> Limits:
        """What a call of a reward function may take."""
        return Limits(self.reward_timeout, self.reward_memory, self.reward_workers)

    @property
    def groups_per_rollout(self) -> int:
        """Prompts of one rollout."""
        return self.groups_per_update * self.updates_per_rollout

    @property
    def trackers(self) -> list[str]:
        """The names in report_to, "none" left out."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]


class RunConfig(GVPOConfig):
    """A config file: GVPOConfig plus what a trainer is given as objects from Python."""

    model: str = Field("smollm2-135m", description="Hub id, folder, .gguf file, or smollm2-135m (embedded).")
    train_dataset: str | None = Field(None, description="Prompts: a .jsonl or .parquet file, or a hub dataset.")
    eval_dataset: str | None = Field(None, description="Held-out prompts, answered greedily.")
    reward_funcs: str | list[str] | None = Field(None, description="module:function, or a ready-made reward's name.")
    output_dir: str | None = Field("runs/train", description="Run folder.")
    sources: list[Spec] | None = Field(
        None, description="Where completions come from, a list of mappings with a type each. Default: the policy."
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, value: Any) -> Any:
        try:
            return None if value is None else read_sources(value)
        except UserError as error:
            raise ConfigError("sources", str(error)) from error


def load_config(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML config file, not yet checked.

    Raises UserError if the file is missing, is not YAML, or is not a flat mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"config {str(path)!r}: no such file")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config {str(path)!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {str(path)!r}: not UTF-8 ({error}); save the file as UTF-8") from error
    except (yaml.YAMLError, *_CONSTRUCTING) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"config {str(path)!r}{line}: not YAML: {problem}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r}: must be a mapping of names to values, one per line")
    return {str(name): value for name, value in values.items()}


def parse_value(text: str) -> Any:
    """A value from the command line, read as in a config file: 1e-6 is a number, null is None, [a, b] a list."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, *_CONSTRUCTING):
        return text


def dump_config(config: GVPOConfig) -> str:
    """The config as YAML that load_config reads back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_CONSTRUCTING = (ValueError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises, beside its own errors, for dates that do not exist, endless numbers and nests."""


class _Loader(yaml.SafeLoader):
    """Reads 1e-6 as a number, as YAML 1.2 does and YAML 1.1 does not, and refuses a name that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = key.value
            if not isinstance(name, str):
                continue
            if name in lines:
                problem = f"{name!r} is given twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the strings that _Loader would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _exponent = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))


def _config_error(error: ValidationError, config: type[BaseModel]) -> ConfigError:
    """The first mistake, with the nearest valid name for an unknown one."""
    if isinstance(own := error.errors()[0].get("ctx", {}).get("error"), ConfigError):
        return own
    return ConfigError(*first_problem(error, config, "gvpo train --help lists them"))
