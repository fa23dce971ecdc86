"""What a run will be: all that can be decided, and refused, before weights load."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gvpo.errors import UserError, located, nearest
from gvpo.models.loading import check_model
from gvpo.rewards.calling import check_signatures
from gvpo.rewards.resolve import RewardFunction, resolve_rewards
from gvpo.sources.dataset import Row, column_names, read_rows
from gvpo.sources.files import GroupFiles
from gvpo.sources.mixture import Mixture
from gvpo.sources.specs import PolicySpec, Spec, TeacherSpec, read_sources
from gvpo.training.checkpoint import check_file, find_checkpoint
from gvpo.training.config import ConfigError, GVPOConfig
from gvpo.training.data_checks import check_answers, check_columns, check_demonstrations, check_rewards
from gvpo.training.reference import PARAMETERS, is_checkpoint
from gvpo.training.samplers import check_sampler

RewardFuncs = str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """rows, eval_rows: the data; columns: every one that any row has. mixture: where completions come from; files: the
    groups of its files. reference: which policy the KL is taken against. updates: how many in all."""

    rows: list[Row]
    eval_rows: list[Row]
    columns: list[str]
    reward_functions: list[RewardFunction]
    mixture: Mixture
    files: GroupFiles | None
    reference: str | int
    updates: int


def plan_run(
    config: GVPOConfig,
    model: nn.Module | str | Path,
    train_dataset: Any,
    reward_funcs: RewardFuncs,
    eval_dataset: Any,
    sources: Any = None,
) -> RunPlan:
    """The plan of a run, from what GVPOTrainer is given; no weights are read.

    Raises UserError for the first mistake, in this order: config, reward imports, rows, model path.
    """
    if eval_dataset is None:
        for name in ("eval_steps", "eval_on_start"):
            if getattr(config, name):
                raise ConfigError(name, "there is nothing to evaluate on; give eval_dataset")
    _check_trackers(config.trackers, config.output_dir)
    check_sampler(config)
    mixture = Mixture(tuple(read_sources(sources)))
    mixture.check(config.num_generations, config.groups_per_update)
    functions = [] if reward_funcs is None else resolve_rewards(reward_funcs, config.reward_limits)
    rows = _read_prompts(config, train_dataset, mixture)
    eval_rows: list[Row] = []
    if eval_dataset is not None:
        eval_rows = read_rows(eval_dataset, prompt_column=config.prompt_column, name="eval_dataset")
    files = None if mixture.files is None else GroupFiles(mixture.files)
    if files is not None:
        files.look()
    brought = rows if files is None else itertools.chain(rows, files.rows())
    check_rewards(brought, eval_rows, functions, config.reward_weights)
    own = [*rows, *eval_rows]
    columns = column_names(own)
    check_signatures(functions, columns)
    check_answers(own, functions)
    if config.output_dir is not None or mixture.replay is not None:
        check_columns(own)
    if rows:
        _check_members(config, rows, mixture)
    check_demonstrations(rows, mixture.demonstrations, functions)
    reference = choose_reference(config, rows, mixture)
    if not isinstance(model, nn.Module):
        if not isinstance(model, str | Path):
            raise UserError(f"model is a {type(model).__name__}; give a module, or a name or path")
        check_model(model)
    elif not hasattr(model, "config"):
        raise UserError(f"model is a {type(model).__name__}; give a causal language model of transformers")
    _check_reference(reference)
    for spec in mixture.given:
        if isinstance(spec, TeacherSpec):
            check_model(spec.model)
    updates = planned_updates(config, len(rows), mixture, files)
    return RunPlan(rows, eval_rows, columns, functions, mixture, files, reference, updates)


def _read_prompts(config: GVPOConfig, train_dataset: Any, mixture: Mixture) -> list[Row]:
    """The dataset's rows; none where whole groups from files are all there is."""
    if mixture.fills:
        return read_rows(train_dataset, prompt_column=config.prompt_column, name="train_dataset")
    if train_dataset is not None:
        raise ConfigError(
            "sources", "no source completes the prompts of train_dataset; add {type: policy}, or give no train_dataset"
        )
    return []


def choose_reference(config: GVPOConfig, rows: Sequence[Row], mixture: Mixture) -> str | int:
    """The reference of a run: as configured, else "initial" for offline-only data and "rollout" where a source samples.

    Raises UserError for a moving reference on offline-only data, unless allow_unanchored, or with trust_ref_logprobs.
    """
    open_rows = not all(row.offline for row in rows)
    # Samplers that follow the weights that this run publishes draw from its policy, only elsewhere.
    followed = mixture.files is not None and mixture.files.follow and config.publish_steps is not None
    offline = not followed and not (open_rows and (mixture.draws or mixture.one(TeacherSpec)))
    sampling = followed or (open_rows and mixture.draws)
    reference = config.reference or ("rollout" if sampling else "initial")
    if offline and (reference == "rollout" or isinstance(reference, int)) and not config.allow_unanchored:
        raise ConfigError(
            "reference",
            f"{reference!r} on offline-only data has no anchor, the policy would collapse; use 'initial' or a model "
            "path, or set allow_unanchored",
        )
    if config.trust_ref_logprobs and (reference == "rollout" or isinstance(reference, int)):
        raise ConfigError(
            "trust_ref_logprobs",
            f"the reference is {reference!r}, which moves with the policy: no number in the data can be its own; use "
            "reference='initial' or a path, or leave it false",
        )
    return reference


def planned_updates(config: GVPOConfig, rows: int, mixture: Mixture, files: GroupFiles | None) -> int:
    """Updates in all: max_steps, or num_train_epochs over this many rows, each in epochs_per_rollout updates.

    Without rows: as many whole rollouts as the files have groups for, each used as often as they say.
    Raises UserError where that is none, or not as many as max_steps.
    """
    if rows:
        drawn = config.groups_per_update - mixture.whole_per_update(config.groups_per_update)
        per_epoch = math.ceil(config.num_train_epochs * rows / max(1, drawn))
        return config.max_steps or per_epoch * config.epochs_per_rollout
    assert files is not None
    if files.spec.follow:
        if config.max_steps is None:
            raise ConfigError("max_steps", "missing; a folder that is followed has no end of its own")
        return config.max_steps
    rollouts = files.held * files.spec.uses // config.groups_per_rollout
    updates = rollouts * config.updates_per_rollout * config.epochs_per_rollout
    if updates < (config.max_steps or 1):
        raise ConfigError(
            "sources",
            f"{files.spec.path} holds {files.held} groups, enough for {updates} updates ({config.groups_per_rollout} "
            "groups a rollout); add groups, raise uses, or lower max_steps or groups_per_update",
        )
    return config.max_steps or updates


def support_gap(config: GVPOConfig, rows: Sequence[Row], mixture: Mixture) -> str | None:
    """Why completions that the reference can give may never be seen, and the counter-example; None where none may.

    Then the optimum is not unique (arXiv 2504.19599, Theorem 2 asks for a sampling law that covers the reference).
    """
    if any(not isinstance(spec, Spec) for spec in mixture.given) or (mixture.files and mixture.files.follow):
        return None
    drawing = [config] if mixture.one(PolicySpec) else []
    drawing += [spec for spec in mixture.given if isinstance(spec, TeacherSpec)]
    if not drawing or all(row.offline for row in rows):
        return "all completions are fixed beforehand (docs/lab.md, sampling/replay-set-alone)"
    if all(one.top_p < 1 or one.top_k > 0 for one in drawing):
        return "all sampling is truncated by top_p or top_k (docs/lab.md, sampling/top-k-alone)"
    return None


def _check_reference(reference: str | int) -> None:
    """Refuse a path that is no model's, and a checkpoint whose parameters are not those that were written."""
    if isinstance(reference, int) or reference in ("rollout", "initial"):
        return
    if not is_checkpoint(reference):
        check_model(reference)
        return
    with located("config, field 'reference'"):
        check_file(find_checkpoint(reference, None), PARAMETERS)


def _check_members(config: GVPOConfig, rows: Sequence[Row], mixture: Mixture) -> None:
    """Refuse data that cannot teach, and completions to be sampled that no forward could hold."""
    if all(row.offline and _rewardable(row) < 2 for row in rows):
        raise UserError(
            f"{rows[0].where}: neither this group nor any other has two completions with rewards; a group needs two "
            "or more to teach anything"
        )
    budget, longest = config.token_budget, config.max_completion_length
    draws = mixture.draws or mixture.one(TeacherSpec)
    if budget is not None and budget <= longest and draws and not all(row.offline for row in rows):
        raise ConfigError(
            "token_budget",
            f"{budget} cannot hold a prompt and a completion of max_completion_length={longest}; raise it, or lower "
            "max_completion_length",
        )


def _rewardable(row: Row) -> int:
    """How many members have, or can get, a reward: a row's own rewards win over functions, for all its members."""
    rewarded = sum(one.reward is not None for one in row.completions)
    return rewarded if row.has_rewards else len(row.completions)


def _check_trackers(names: Sequence[str], output_dir: str | None) -> None:
    """Refuse trackers that accelerate does not know, or would leave out silently."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in sorted(available) if "all" in names else names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError("report_to", f"{name!r} is unknown; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise ConfigError("report_to", f"{name!r} is not installed; pip install {name}")
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and output_dir is None:
            raise ConfigError("report_to", f"{name!r} writes files; give output_dir")
