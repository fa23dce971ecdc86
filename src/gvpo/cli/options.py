"""A flag for every config field, and the config that a file and flags make together."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from pydantic.fields import FieldInfo

from gvpo.cli.main import SWITCH
from gvpo.errors import UserError
from gvpo.rewards.limits import Limits
from gvpo.training.config import ConfigError, GVPOConfig, RunConfig, load_config, parse_value

if TYPE_CHECKING:
    from gvpo.rewards.resolve import RewardFunction


def config_option(name: str, metavar: str, *flags: str) -> Any:
    """An option of another command for a config field, with its description."""
    help_text = RunConfig.model_fields[name].description
    return typer.Option(*(flags or (f"--{name}",)), metavar=metavar, help=help_text, show_default=True)


def config_default(name: str) -> Any:
    """The default of a config field."""
    return RunConfig.model_fields[name].default


def checked_config(**values: Any) -> GVPOConfig:
    """These options of a command as a config. Raises UserError that names the option."""
    try:
        return GVPOConfig(**values)
    except ConfigError as error:
        raise UserError(f"--{error.field}: {error.problem}") from error


def reward_functions(names: list[str], limits: Limits) -> list[RewardFunction]:
    """What `--reward` names. Raises UserError."""
    from gvpo.rewards.resolve import resolve_rewards

    try:
        return resolve_rewards(names, limits)
    except UserError as error:  # which knows the config's name for it
        raise UserError(f"--reward: {str(error).removeprefix('reward_funcs: ')}") from error


def with_config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Have typer see, in place of the command's `**settings`, one option per field of RunConfig.

    What the user writes arrives in `settings` as text, None where a flag was not given; `read_config` takes it.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    assert own.pop().kind is inspect.Parameter.VAR_KEYWORD
    # What every run must name comes first in the help.
    fields = sorted(RunConfig.model_fields.items(), key=lambda item: item[0] in GVPOConfig.model_fields)
    flags = [_flag(name, field) for name, field in fields]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + flags
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def read_config(file: str | None, settings: Mapping[str, str | None]) -> RunConfig:
    """The config of a run: the defaults, then the file's values, then the flags that were given.

    file: YAML, or None. settings: flag name to text, None = not given.
    Raises UserError that names the flag, or the file and line, of the first mistake.
    """
    given = {name: read_flag(name, text) for name, text in settings.items() if text is not None}
    in_file = {} if file is None else load_config(file)
    try:
        return RunConfig(**{**in_file, **given})
    except ConfigError as error:
        raise UserError(_located(error, file, in_file, given)) from error


def read_flag(name: str, text: str) -> Any:
    """The value that a flag's text stands for: read as YAML where the field takes such a value, else the text itself.

    A run may so be named 2024 and a model true: only what the field can hold is taken for a number, a list or null.
    """
    value = parse_value(text)
    kinds = _kinds(RunConfig.model_fields[name].annotation)
    return text if str in kinds and type(value) not in kinds else value


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
    default = "" if shown is None else f"  [default: {shown}]"
    option = typer.Option(f"--{name}", metavar=_metavar(field.annotation), help=f"{field.description}{default}")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _metavar(annotation: Any) -> str:
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    if choices:
        return "|".join(map(str, choices))
    names = {bool: SWITCH, int: "INT", float: "FLOAT", str: "TEXT", list: "[A,B,...]", type(None): None}
    return "|".join(names[kind] for kind in _kinds(annotation) if names[kind])


def _kinds(annotation: Any) -> list[type]:
    """The plain types that a field may hold, in its order: `str | list[str] | None` is str, list, NoneType."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return [type(value) for value in typing.get_args(annotation)[:1]]
    if origin in (types.UnionType, typing.Union):
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part)]
    return [origin or annotation]


def _located(error: ConfigError, file: str | None, in_file: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The mistake, with the flag or the file and line where it stands."""
    if error.field is None:
        where = "" if file is None else f"{file}: " if not given else f"{file} with the flags: "
        return f"{where}{error.problem}"
    if error.field in given:
        return f"--{error.field}: {error.problem}"
    assert file is not None and error.field in in_file, "a default that RunConfig refuses"
    line = _lines(file).get(error.field)
    return f"{file}{f', line {line}' if line else ''}, field {error.field!r}: {error.problem}"


def _lines(file: str) -> dict[str, int]:
    """The line of every top-level name of a YAML mapping, from 1."""
    root = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return {key.value: key.start_mark.line + 1 for key, _ in root.value if isinstance(key, yaml.ScalarNode)}
