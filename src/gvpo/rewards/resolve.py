"""From what a config or a caller writes to reward functions: `module:function`, a ready-made name, or a callable."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gvpo.errors import UserError, error_line, nearest, shortened
from gvpo.rewards.limits import Limits
from gvpo.rewards.ready import BOUNDED, POOLED, READY


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, sync or async, and the name that metrics, tables and errors call it by."""

    name: str
    function: Callable[..., Any]


def resolve_rewards(
    spec: str | Callable[..., Any] | Sequence[str | Callable[..., Any]], pool: Limits | None = None
) -> list[RewardFunction]:
    """Find the reward functions that `spec` names, in its order.

    spec: one entry or a sequence of them. An entry is a callable, `module:function` (imported with the working
        directory on the path), or the name of a ready-made reward (`gvpo.rewards.ready`).
    pool: functions that are named by their module run in killable processes, within these limits; None, or no workers:
        they are imported here, like callables.
    Returns one `RewardFunction` per entry. A name is the function's own; of two alike, the later gets `_2`, `_3`, ...
    Raises UserError for an unknown name, a module that is not found or fails on import, a missing function, or an
    entry that cannot be called.
    """
    entries = [spec] if isinstance(spec, str) or callable(spec) else spec
    if not isinstance(entries, Sequence):
        raise UserError(f"reward_funcs is {spec!r}: give a function, 'module:function', or a list of these")
    entries = [_entry(entry) for entry in entries]
    pooled = _pooled([entry for entry in entries if isinstance(entry, str) and ":" in entry], pool)
    functions = [
        entry if not isinstance(entry, str) else pooled[entry] if entry in pooled else _find(entry) for entry in entries
    ]
    for position, function in enumerate(functions):
        if not callable(function):
            raise UserError(
                f"reward_funcs: entry {position} (counted from 0) is {shortened(repr(function))}, which cannot be "
                "called: give a function or 'module:function'"
            )
    return [RewardFunction(*pair) for pair in zip(_unique_names(functions), functions, strict=True)]


def _entry(entry: str | Callable[..., Any]) -> str | Callable[..., Any]:
    """As `module:function` what is meant for a pool, the function itself too."""
    if isinstance(entry, str):
        return POOLED.get(entry, entry)
    module, name = getattr(entry, "__module__", ""), getattr(entry, "__name__", "")
    itself = getattr(sys.modules.get(module), name, None) is entry  # and no wrapper that took over its names
    return f"{module}:{name}" if itself and f"{module}:{name}" in POOLED.values() else entry


def _pooled(entries: list[str], limits: Limits | None) -> dict[str, Callable[..., Any]]:
    if not entries or limits is None or limits.workers == 0:
        return {}
    from gvpo.rewards.workers.pool import RewardPool

    names = list(dict.fromkeys(entries))
    return dict(zip(names, RewardPool(names, limits).functions, strict=True))


def _find(entry: str) -> Callable[..., Any]:
    entry = BOUNDED.get(entry, entry)
    if ":" not in entry:
        if entry in READY:
            return READY[entry]
        raise UserError(
            f"reward_funcs: no ready-made reward is named {entry!r}; {nearest(entry, [*READY, *POOLED, *BOUNDED])} "
            "(a function of your own is written 'module:function')"
        )
    module_name, _, function_name = entry.partition(":")
    if ":" in function_name:
        raise UserError(f"reward_funcs: {entry!r} has more than one colon: write 'module:function'")
    if not function_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(
            f"reward_funcs: {entry!r} is not of the form 'module:function': the module is written as in an import, "
            "with dots, without folders' slashes and without '.py'"
        )
    module = _import(module_name, entry)
    if not hasattr(module, function_name):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(
            f"reward_funcs: {entry!r}: module {module_name!r} ({getattr(module, '__file__', 'built in')}) has no "
            f"{function_name!r}; {nearest(function_name, names)}"
        )
    function = getattr(module, function_name)
    if not callable(function):
        raise UserError(
            f"reward_funcs: {entry!r} is a {type(function).__name__}, which cannot be called: name a function"
        )
    return function


def _import(module_name: str, entry: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        # It stays there, as with `python -m`: a reward function may import its neighbours when it is called.
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except UserError as error:
        raise UserError(f"reward_funcs: {entry!r}: {error}") from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            hint = f"; write {module_name[:-3]!r} without '.py'" if module_name.endswith(".py") else ""
            raise UserError(
                f"reward_funcs: {entry!r}: there is no module {error.name!r} in the working directory {folder} or on "
                f"the Python path{hint}"
            ) from error
        raise UserError(
            f"reward_funcs: {entry!r}: importing {module_name!r} raised {error_line(error)}: fix the module"
        ) from error


def _unique_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    own = [own_name(function) for function in functions]
    names: list[str] = []
    for name in own:
        candidate, number = name, 1
        while candidate in names or (number > 1 and candidate in own):
            number += 1
            candidate = f"{name}_{number}"
        names.append(candidate)
    return names


def own_name(function: Callable[..., Any]) -> str:
    """What a function calls itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
