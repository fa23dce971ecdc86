"""Policies that a run publishes while it trains: a folder of update-000120/, ..., whole models, the newest ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gvpo.errors import UserError
from gvpo.models.loading import load_model

_UPDATE = re.compile(r"update-(\d+)")


def newest_update(folder: str | Path) -> int | None:
    """The number of the newest policy published in a folder; None if there is none yet, or no such folder."""
    return max(_updates(Path(folder)), default=None)


def is_policy_folder(path: str | Path, *, empty: bool = False) -> bool:
    """Whether a run publishes, or (empty) may begin to publish, its policy here: no model's own folder, or file."""
    folder = Path(path)
    if newest_update(folder) is not None:
        return True
    if not folder.exists():
        return empty and folder.name == "policy"  # as runs name it; any other name may be a hub id, or mistyped
    return empty and folder.is_dir() and all(name.startswith(".") for name in _names(folder))


def load_newest(folder: str | Path, device: Any) -> tuple[Any, Any | None, int]:
    """The newest policy of a folder that has one: model, tokenizer and number.

    One that is removed while it is read is no error, as there is a newer one then. Raises UserError as `load_model`.
    """
    while True:
        updates = _updates(Path(folder))
        if not updates:
            raise UserError(f"model {str(folder)!r}: its policies update-* are gone; is the run still there?")
        update = max(updates)
        chosen, before = updates[update], _names(updates[update])
        try:
            model, tokenizer = load_model(str(chosen), device=device)
        except (UserError, OSError):
            if _names(chosen) == before:
                raise
            continue
        if _names(chosen) == before:  # else the tokenizer may have been gone before it was read
            return model, tokenizer, update


def _updates(folder: Path) -> dict[int, Path]:
    found = {name: match for name in _names(folder) if (match := _UPDATE.fullmatch(name))}
    return {int(match[1]): folder / name for name, match in found.items()}


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
