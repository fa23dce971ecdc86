"""A run of this library as options of `python -m verl.trainer.main_ppo`: a pure mapping, name by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from gvpo.errors import UserError

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_LOSS, _REWARD = f"{_ACTOR}.policy_loss", "reward.custom_reward_function"

CONSTANT = {
    "algorithm.adv_estimator": "grpo",
    f"{_LOSS}.loss_mode": "gvpo",
    f"{_LOSS}._target_": "gvpo.integrations.verl.GVPOPolicyLossConfig",
    f"{_ROLLOUT}.name": "vllm",
    f"{_ACTOR}.use_dynamic_bsz": True,
    f"{_ROLLOUT}.log_prob_use_dynamic_bsz": True,
    "trainer.project_name": "gvpo",
}
"""What every run has."""

SAME = {
    "beta": f"+{_LOSS}.gvpo_beta",
    "num_generations": f"{_ROLLOUT}.n",
    "temperature": f"{_ROLLOUT}.temperature",
    "top_p": f"{_ROLLOUT}.top_p",
    "max_completion_length": "data.max_response_length",
    "vllm_tensor_parallel_size": f"{_ROLLOUT}.tensor_model_parallel_size",
    "groups_per_update": f"{_ACTOR}.ppo_mini_batch_size",
    "epochs_per_rollout": f"{_ACTOR}.ppo_epochs",
    "learning_rate": f"{_ACTOR}.optim.lr",
    "weight_decay": f"{_ACTOR}.optim.weight_decay",
    "gradient_checkpointing": f"{_MODEL}.enable_gradient_checkpointing",
    "shuffle_dataset": "data.shuffle",
    "seed": "data.seed",
    "save_total_limit": "trainer.max_actor_ckpt_to_keep",
    "eval_on_start": "trainer.val_before_train",
}
"""By name, the option that means the same."""

_PLAIN = re.compile(r"(?!(?i:true|false|null|nan|inf)$)[A-Za-z_][\w./:-]*")
"""What hydra reads as a string without quotes."""

_DTYPES = ("param", "reduce")
_TRACKERS = ("none", "wandb", "tensorboard", "trackio", "mlflow", "swanlab", "clearml")
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "cosine", "cosine": "cosine"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the data say of a run. prompts: rows of the training file; longest_prompt: tokens of any prompt; updates: in
    all; reference: "rollout" or "initial"; template: a chat template for prompts that are strings, None for messages.
    """

    prompts: int
    longest_prompt: int
    updates: int
    reference: str | int
    template: str | None
    evaluates: bool


def check_run(run: Mapping[str, Any], reference: str | int) -> None:
    """Raise UserError for what would be another run in verl. run: as in `verl_options`."""
    if run["objective"] != "gvpo":
        raise UserError(f"objective is {run['objective']!r}: in verl this library brings gvpo; verl has its own losses")
    if reference not in ("rollout", "initial"):
        raise UserError(f"reference is {reference!r}: in verl it is 'rollout' or 'initial'")
    if any(source.type != "policy" for source in run["sources"] or ()):
        raise UserError("sources: verl draws all completions from the policy; leave sources out")
    if run["lr_scheduler_type"] not in _SCHEDULES:
        raise UserError(f"lr_scheduler_type is {run['lr_scheduler_type']!r}: verl has constant and cosine")
    for name in _names(run["report_to"]):
        if name not in _TRACKERS:
            raise UserError(f"report_to: {name!r} is none of verl's; it has {', '.join(_TRACKERS)}")
    if not run["reward_funcs"]:
        raise UserError("reward_funcs: verl scores what it draws; name a function")


def verl_options(run: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """Every setting of a run in verl's names, in order; files and model are left to the caller.

    run: names and values of a whole config. A step of verl is one rollout with all its updates: counts of updates
    become counts of rollouts, rounded up.

    Raises UserError for what would be another run.
    """
    check_run(run, facts.reference)
    updates = run["updates_per_rollout"] * run["epochs_per_rollout"]
    batch, steps = run["groups_per_update"] * run["updates_per_rollout"], -(-facts.updates // updates)
    # verl refuses a sequence that is longer than a micro-batch may be.
    tokens = max(run["token_budget"] or 0, facts.longest_prompt + run["max_completion_length"])

    def rollouts(count: int | None) -> int:
        return steps if count is None else -(-count // updates)

    options = CONSTANT | {name: run[own] for own, name in SAME.items() if run[own] is not None}
    options |= {
        "data.train_batch_size": batch,
        "data.max_prompt_length": facts.longest_prompt,
        f"{_ROLLOUT}.top_k": run["top_k"] or -1,
        f"{_ROLLOUT}.gpu_memory_utilization": run["vllm_gpu_memory_utilization"] if run["use_vllm"] else 0.5,
        f"{_ACTOR}.optim.betas": [run["adam_beta1"], run["adam_beta2"]],
        f"{_ACTOR}.optim.override_optimizer_config": {"eps": run["adam_epsilon"]},
        f"{_ACTOR}.optim.clip_grad": run["max_grad_norm"] or 1e9,
        f"{_ACTOR}.optim.lr_scheduler_type": _SCHEDULES[run["lr_scheduler_type"]],
        f"{_ACTOR}.optim.lr_warmup_steps": rollouts(run["warmup_steps"]),
        f"{_ACTOR}.ppo_max_token_len_per_gpu": tokens,
        f"{_ROLLOUT}.log_prob_max_token_len_per_gpu": tokens,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": -(-steps // (facts.prompts // batch)),
        "trainer.save_freq": rollouts(run["save_steps"]),
        "trainer.test_freq": rollouts(run["eval_steps"]) if facts.evaluates else -1,
        "trainer.logger": ["console", *(name for name in _names(run["report_to"]) if name != "none")],
        "trainer.experiment_name": run["run_name"] or PurePath(run["output_dir"] or "run").name,
    }
    if facts.reference == "initial":
        # verl computes the reference's log-probs where its own KL term is on; with coefficient 0 it adds nothing.
        options |= {f"+{_LOSS}.gvpo_reference": "ref", f"{_ACTOR}.use_kl_loss": True, f"{_ACTOR}.kl_loss_coef": 0.0}
        options |= {"actor_rollout_ref.ref.log_prob_use_dynamic_bsz": True}
        options |= {"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": tokens}
    if not run["bf16"]:
        roles = (_ACTOR, "actor_rollout_ref.ref") if facts.reference == "initial" else (_ACTOR,)
        options |= {f"+{role}.fsdp_config.mixed_precision.{name}_dtype": "fp32" for role in roles for name in _DTYPES}
    if facts.template is not None:
        options[f"{_MODEL}.custom_chat_template"] = facts.template
    options[f"{_REWARD}.path"] = "pkg://gvpo.integrations.verl_runs.reward"
    options[f"+{_REWARD}.reward_kwargs.reward_funcs"] = _names(run["reward_funcs"])
    for name in ("reward_weights", "reward_workers", "reward_timeout", "reward_memory"):
        if run[name] is not None:
            options[f"+{_REWARD}.reward_kwargs.{name}"] = run[name]
    for name, value in options.items():
        if "${" in str(value):
            raise UserError(f"{name}: verl would read the ${{ in {value!r} as a reference; write it without")
    return options


def differences(run: Mapping[str, Any], facts: Facts) -> list[str]:
    """What of a run verl does otherwise, one line each."""
    batch = run["groups_per_update"] * run["updates_per_rollout"]
    known = {
        "lr_scheduler_type: linear becomes cosine; verl has constant and cosine, and counts in rollouts": run[
            "lr_scheduler_type"
        ]
        == "linear",
        "warmup_steps: counted in rollouts, and the updates of the first rollout have a rate of 0": run["warmup_steps"],
        f"temperature: verl takes log-probs at {run['temperature']}, not at 1": run["temperature"] != 1,
        "rollouts are drawn in bfloat16": True,
        f"an epoch leaves out {facts.prompts % batch} of {facts.prompts} prompts, which fill no batch": facts.prompts
        % batch,
        "dropout of the model's config is left on (most have none)": run["disable_dropout"],
    }
    return [line for line, holds in known.items() if holds]


def command(options: Mapping[str, Any]) -> list[str]:
    """The options as arguments, quoted for hydra; a shell's quotes are the caller's."""
    return [f"{name}={_written(value)}" for name, value in options.items()]


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_written(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if not isinstance(value, str) or _PLAIN.fullmatch(value):
        return str(value)
    # Backslashes count for hydra before a quote and at the end alone.
    text = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"'{text}'"
