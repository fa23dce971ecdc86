"""Check the options of a verl run against the verl that is installed, without starting anything.

    python -m gvpo.integrations.verl_runs.dry_run OPTION=VALUE ...

takes the options of `python -m verl.trainer.main_ppo`, and no flags of hydra's. Covered: every option's name, those
that are added with `+` too; other kinds of values than verl's own; losses, estimators, engines and loggers by name;
how rows and engines divide among GPUs; values that verl's own configuration classes and its start-up check refuse;
what the plug-in refuses, and whether verl found it. Not covered: files, models, memory, sizes out of range, and names
under mappings that verl leaves open (they are listed).
"""

from __future__ import annotations

import difflib
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__" and find_spec("verl") is None:
    print("dry run: verl is not installed here; install the extra verl where the run will be", file=sys.stderr)
    sys.exit(2)

import verl
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

# Before the plug-in is imported from here.
FOUND = "gvpo" in POLICY_LOSS_REGISTRY

from gvpo.errors import UserError  # noqa: E402
from gvpo.integrations.verl.config import NO_BETA  # noqa: E402
from gvpo.integrations.verl.driver import check_options, uses_gvpo  # noqa: E402

CHECKED = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm")
"""What is made into verl's own configuration classes, which check values."""

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def check_run(options: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """The composed configuration of `main_ppo` with these options, and the names that nothing could check.

    Raises UserError, one line, for the first option that verl does not know or that a check refuses.
    """
    names = _names(options)
    with initialize_config_dir(str(Path(str(verl.__file__)).parent / "trainer" / "config"), version_base=None):
        own = compose("ppo_trainer")
        for option, name in zip(options, names, strict=True):
            if not option.startswith(("+", "~")):
                _check_listed(own, name)
        try:
            config = compose("ppo_trainer", [*options])
        except Exception as error:
            raise UserError(_innermost(error)) from error
    unchecked = [name for name in names if not _is_known(config, own, name)]
    for name in names:
        _check_kind(name, *(OmegaConf.select(one, name, throw_on_missing=False) for one in (own, config)))
    try:
        _check_names(config)
        _check_division(config)
        if uses_gvpo(config):
            _check_gvpo(config)
        _check_by_verl(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_innermost(error)) from error
    return config, unchecked


def _check_names(config: DictConfig) -> None:
    """What verl looks up by name."""
    from verl.utils.tracking import Tracking
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    loggers = config.trainer.logger
    for option, values, known in (
        (
            f"{_ACTOR}.policy_loss.loss_mode",
            [config.actor_rollout_ref.actor.policy_loss.loss_mode],
            POLICY_LOSS_REGISTRY,
        ),
        ("algorithm.adv_estimator", [config.algorithm.adv_estimator], ADV_ESTIMATOR_REGISTRY),
        (f"{_ROLLOUT}.name", [config.actor_rollout_ref.rollout.name], {name for name, _ in _ROLLOUT_REGISTRY}),
        ("trainer.logger", [loggers] if isinstance(loggers, str) else loggers, Tracking.supported_backend),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"{option}={value}: {_hint(str(value), sorted(map(str, known)))}")


def _check_division(config: DictConfig) -> None:
    """verl asserts on these after the first rollout."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    gpus, together = config.trainer.n_gpus_per_node * config.trainer.nnodes, rollout.tensor_model_parallel_size
    split = actor.get("ulysses_sequence_parallel_size", 1)
    if actor.strategy == "megatron":
        split = 1
        for name in ("tensor_model", "pipeline_model", "context"):
            split *= actor.megatron[f"{name}_parallel_size"]
    if gpus < 1 or gpus % together or gpus % split:
        raise UserError(f"{gpus} GPUs: rollout engines take {together} each, a copy of the actor {split}")
    rows, ranks = actor.ppo_mini_batch_size * rollout.n, gpus // split
    if rows < 1 or rows % ranks:
        raise UserError(
            f"{_ACTOR}.ppo_mini_batch_size={actor.ppo_mini_batch_size} with {_ROLLOUT}.n={rollout.n} is {rows} rows: "
            f"they must divide among {ranks} ranks"
        )


def _check_gvpo(config: DictConfig) -> None:
    check_options(config, legacy=not config.trainer.use_v1)
    if config.critic.enable or config.algorithm.adv_estimator == "gae":
        raise UserError("a critic is built, and GVPO has none: set algorithm.adv_estimator=grpo")
    if not FOUND:
        raise UserError(
            "verl does not load the plug-in: VERL_USE_EXTERNAL_PLUGINS leaves it out, or it has no metadata; "
            "set VERL_USE_EXTERNAL_MODULES=gvpo.integrations.verl.plugin"
        )


def _check_by_verl(config: DictConfig) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for section in CHECKED:
        try:
            omega_conf_to_dataclass(OmegaConf.select(config, section))
        except Exception as error:
            raise UserError(f"{section}: {_innermost(error)}") from error
    with warnings.catch_warnings(action="ignore"):  # that there is no critic is what GRPO and GVPO want
        validate_config(config, need_reference_policy(config), need_critic(config))


def _check_listed(own: DictConfig, name: str) -> None:
    """Raise UserError where verl's files do not list this option. own: verl's configuration as it comes."""
    parent, _, last = name.rpartition(".")
    node = OmegaConf.select(own, parent) if parent else own
    if isinstance(node, DictConfig) and last not in [*node] and not name.startswith("hydra."):
        known = [f"{parent}.{one}".removeprefix(".") for one in node]
        hint = f"write +{name}" if last.startswith("gvpo_") else _hint(name, known)
        raise UserError(f"{name}: verl {_version()} does not list this option; {hint}")


def _check_kind(name: str, was: Any, value: Any) -> None:
    """Raise UserError where verl's own value is a number, true or false, and the new one is not."""
    if isinstance(was, int | float) and not isinstance(value, int | float | None):
        kind = "true or false" if isinstance(was, bool) else "a number"
        raise UserError(f"{name}={value}: verl has {kind} here, such as {was}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _names(options: Sequence[str]) -> list[str]:
    for option in options:
        if option.startswith("-"):
            raise UserError(f"{option}: only OPTION=VALUE here; for Megatron, model_engine=megatron")
    try:
        return [str(override.key_or_group) for override in OverridesParser.create().parse_overrides([*options])]
    except Exception as error:
        raise UserError(f"options are OPTION=VALUE: {_innermost(error)}") from error


def _is_known(config: DictConfig, own: DictConfig, name: str) -> bool:
    """Whether verl names this option, in its files or as a field of the section's class; False where it leaves names
    open.

    Raises UserError where the class of the option's section has no such field, or there is no such class.
    """
    if OmegaConf.is_missing(own, name) or OmegaConf.select(own, name, throw_on_missing=False) is not None:
        return True
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        section, listed = (OmegaConf.select(one, ".".join(parts[:depth])) for one in (config, own))
        if isinstance(listed, DictConfig) and parts[depth] in [*listed]:
            return depth == len(parts) - 1
        if isinstance(section, DictConfig) and section.get("_target_") is not None:
            try:
                made = get_class(section["_target_"])
            except Exception as error:
                raise UserError(f"{'.'.join(parts[:depth])}._target_: {_innermost(error)}") from error
            known = [field.name for field in fields(made)] if is_dataclass(made) else [parts[depth]]
            if parts[depth] not in known:
                hint = NO_BETA if parts[depth] in ("gvpo_beta", "gvpo_reference") else _hint(parts[depth], known)
                raise UserError(f"{name}: {section['_target_']} has no such field; {hint}")
            return depth == len(parts) - 1
    return False


def _innermost(error: BaseException) -> str:
    """Its cause on one line; where it says nothing, the line of code that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    return " ".join(str(error).split()) or f"{type(error).__name__} at {frames[-1].line if frames else 'unknown'}"


def _version() -> str:
    return str(vars(verl)["__version__"])


def main(options: Sequence[str]) -> int:
    """Print what was checked. Returns the exit code: 0, or 2 with one line on standard error."""
    try:
        config, unchecked = check_run(options)
    except UserError as error:
        print(f"dry run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name in _names(options):
        value: Any = OmegaConf.select(config, name)
        print(f"  {name} = {value}" + ("   (not checked: verl leaves its names open)" if name in unchecked else ""))
    rest = f", {len(unchecked)} not checked" if unchecked else ""
    print(f"{len(options) - len(unchecked)} options known to verl {_version()}{rest}; nothing was started")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
