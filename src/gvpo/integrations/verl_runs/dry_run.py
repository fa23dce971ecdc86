"""Check the options of a verl run against the verl that is installed, without starting anything.

    python -m gvpo.integrations.verl_runs.dry_run OPTION=VALUE ...

takes the options of `python -m verl.trainer.main_ppo`, and no flags of hydra's. Covered: every option's name, those
that are added with `+` too; text where verl has a number; values that verl's own configuration classes and its start-up
check refuse; what the plug-in refuses. Not covered: files, models, memory, and names under mappings that verl leaves
open (they are listed).
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import verl
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gvpo.errors import UserError
from gvpo.integrations.verl.driver import check_options, uses_gvpo

CHECKED = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm")
"""What is made into verl's own configuration classes, which check values."""


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
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_innermost(error)) from error
    unchecked = [name for name in names if not _is_known(config, own, name)]
    for name in names:
        was, value = (OmegaConf.select(one, name, throw_on_missing=False) for one in (own, config))
        if isinstance(was, int | float) and isinstance(value, str):
            raise UserError(f"{name}={value}: verl has a {type(was).__name__} here, such as {was}")
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    for section in CHECKED:
        try:
            omega_conf_to_dataclass(OmegaConf.select(config, section))
        except Exception as error:
            raise UserError(f"{section}: {_innermost(error)}") from error
    if uses_gvpo(config):
        check_options(config, legacy=not config.trainer.use_v1)
        if config.critic.enable or config.algorithm.adv_estimator == "gae":
            raise UserError("a critic is built, and GVPO has none: set algorithm.adv_estimator=grpo")
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no critic is what GRPO and GVPO want
            validate_config(config, need_reference_policy(config), need_critic(config))
    except Exception as error:
        raise UserError(_innermost(error)) from error
    return config, unchecked


def _check_listed(own: DictConfig, name: str) -> None:
    """Raise UserError where verl's files do not list this option. own: verl's configuration as it comes."""
    parent, _, last = name.rpartition(".")
    node = OmegaConf.select(own, parent) if parent else own
    if isinstance(node, DictConfig) and last not in [*node]:
        hint = f"write +{name}" if last.startswith("gvpo_") else _hint(last, [*map(str, node)], f"{parent}.")
        raise UserError(f"{name}: verl {version('verl')} does not list this option; {hint}")


def _hint(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}"


def _names(options: Sequence[str]) -> list[str]:
    for option in options:
        if option.startswith("--"):
            raise UserError(f"{option}: only OPTION=VALUE here; for Megatron, model_engine=megatron")
    try:
        return [str(override.key_or_group) for override in OverridesParser.create().parse_overrides([*options])]
    except HydraException as error:
        raise UserError(f"options are OPTION=VALUE: {_innermost(error)}") from error


def _is_known(config: DictConfig, own: DictConfig, name: str) -> bool:
    """Whether verl names this option, in its files or as a field of the section's class; False where it leaves names
    open.

    Raises UserError where the class of the option's section has no such field.
    """
    if OmegaConf.is_missing(own, name) or OmegaConf.select(own, name, throw_on_missing=False) is not None:
        return True
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        section, listed = (OmegaConf.select(one, ".".join(parts[:depth])) for one in (config, own))
        if isinstance(listed, DictConfig) and parts[depth] in [*listed]:
            return depth == len(parts) - 1
        if isinstance(section, DictConfig) and section.get("_target_") is not None:
            made = get_class(section["_target_"])
            known = [field.name for field in fields(made)] if is_dataclass(made) else [parts[depth]]
            if parts[depth] not in known:
                raise UserError(f"{name}: {section['_target_']} has no such field; {_hint(parts[depth], known)}")
            return depth == len(parts) - 1
    return False


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def main(options: Sequence[str]) -> int:
    """Print what was checked. Returns the exit code: 0, or 2 with one line on standard error."""
    try:
        config, unchecked = check_run(options)
    except UserError as error:
        print(f"dry run: {error}", file=sys.stderr)
        return 2
    for name in _names(options):
        value: Any = OmegaConf.select(config, name)
        print(f"  {name} = {value}" + ("   (not checked: verl leaves its names open)" if name in unchecked else ""))
    print(f"{len(options)} options, all known to verl {version('verl')}; nothing was started")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
