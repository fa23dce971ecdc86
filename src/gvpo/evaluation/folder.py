"""A run's folder: `settings.json`, a file of groups for each task, and at the end `results.json` and `results.txt`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gvpo.errors import UserError
from gvpo.group_files import locked_file

SETTINGS, RESULTS, TABLE = "settings.json", "results.json", "results.txt"


@contextmanager
def run_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder of a run with these settings, this process's own while the block lasts; made if it is not there.

    settings: JSON; the folder may have more. Raises UserError for a folder of other settings, naming the first, one
    that holds anything else, or that another process evaluates into.
    """
    if folder.is_dir() and _visible(folder) and not (folder / SETTINGS).exists():
        raise UserError(f"{folder}: holds something other than an evaluation; give another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder as --out")
    stored = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else None
    if stored is not None and (name := _difference(stored, settings)):
        old, new = _value(stored, name), _value(settings, name)
        raise UserError(f"{folder}: was evaluated with {name} {old}, now it is {new}; give that, or another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror}); give another --out") from error
    lock = folder / ".lock"
    with locked_file(lock, "ab", f"{folder}: another process is evaluating into it; wait, or give another --out"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _visible(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that gvpo eval wrote") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object; give a folder that gvpo eval wrote")
    return value


def write_text(path: Path, text: str) -> None:
    """The file, whole or not at all. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or give another --out"
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The object as JSON, whole or not at all. Raises UserError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The dotted name of the first setting that differs; None where none does."""
    for name, new in given.items():
        old = stored.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            if inner := _difference(old, new):
                return f"{name}.{inner}"
        elif old != new:
            return name
    return None


def _value(settings: Mapping[str, Any], name: str) -> str:
    value: Any = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return ", ".join(value) if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)
