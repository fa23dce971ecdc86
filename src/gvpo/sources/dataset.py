"""The dataset: rows with a prompt, with or without completions, checked before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import FieldError, UserError, located
from gvpo.group_files import numbered_rows
from gvpo.groups import DATASET_KEYS, Completion, Group, group_from_dict
from gvpo.hub import check_hub

Ids = dict[str, tuple[str, bytes]]
"""Groups by id: where each is, and a hash of its prompt."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset: a prompt to draw completions for, or an offline group.

    completions: empty where a source must draw them. has_rewards: the completions' own rewards win over functions.
    where: how messages name the row ("data.jsonl, line 3"). id: a given group's own.
    """

    prompt: str | list[dict] | None
    prompt_ids: list[int] | None
    columns: dict[str, Any]
    completions: tuple[Completion, ...]
    where: str
    id: str | None = None

    @property
    def offline(self) -> bool:
        """Whether the row brings its own completions."""
        return bool(self.completions)

    @property
    def has_rewards(self) -> bool:
        """Whether the row brings its own rewards: one is enough, the members without leave the group."""
        return any(completion.reward is not None for completion in self.completions)

    def group(self, completions: Iterable[Completion] | None = None) -> Group:
        """A group of this prompt with these completions (its own by default), sharing nothing mutable with the row."""
        members = [replace(completion) for completion in (self.completions if completions is None else completions)]
        return Group(self.prompt, members, prompt_ids=self.prompt_ids, id=self.id, columns=self.columns)


def read_rows(data: Any, *, prompt_column: str = "prompt", name: str = "train_dataset") -> list[Row]:
    """The rows of a dataset, checked.

    data: a list of Groups or of row dicts, a datasets.Dataset, or a path: .jsonl, .parquet, or a hub dataset
    ("owner/name" or "owner/name:split"; split train by default). prompt_column: where the prompt is; never guessed.
    Raises UserError, one line, naming file, line (from 1) and field.
    """
    source: Iterable[tuple[str, Any]]
    if isinstance(data, str | Path):
        source = _rows_of_path(str(data))
        name = str(data)
    elif isinstance(data, Mapping):
        raise UserError(f"{name}: a mapping of {', '.join(map(str, data))}; give one split, or a list of rows")
    elif isinstance(data, Iterable):
        source = ((f"{name}, row {number}", row) for number, row in enumerate(data, start=1))
    else:
        kind = type(data).__name__
        raise UserError(f"{name}: expected a dataset, a list of rows or of Groups, or a path, got {kind}")
    rows = [read_row(row, where, prompt_column) for where, row in source]
    ids: Ids = {}
    # Who makes groups in a program may give one twice: that is no draw that was written down again.
    for row in rows if isinstance(data, str | Path) else []:
        check_id(row, ids)
    if not rows:
        raise UserError(f"{name}: no rows; give at least one prompt")
    return rows


def _rows_of_path(path: str) -> Iterator[tuple[str, Any]]:
    if path.endswith((".jsonl", ".parquet")):
        return numbered_rows(path)
    if Path(path).exists() or Path(path).suffix in (".json", ".csv", ".tsv", ".txt", ".arrow"):
        raise UserError(f"{path}: not a dataset that is read here; give a .jsonl or .parquet file, or a hub dataset")
    return _hub_rows(path)


def _hub_rows(path: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, split = path.partition(":")
    check_hub("dataset", name, "give a .jsonl or .parquet file")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no such file, and no dataset of that name could be loaded: {reason}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(dataset, start=1))


def read_row(row: Any, where: str, prompt_column: str = "prompt") -> Row:
    """One row of a dataset, a Group or a mapping, checked; where: how messages name it. Raises UserError."""
    with located(where):
        if isinstance(row, Group):
            return _group_row(row, where)
        if not isinstance(row, Mapping):
            raise UserError(f"expected an object with {prompt_column!r}, got {row!r:.60}")
        return _mapping_row(row, where, prompt_column)


def check_id(row: Row, ids: Ids) -> None:
    """Refuse a group whose id another has: an id is for one draw. ids: of the rows before it; its own is added.

    Raises UserError.
    """
    if row.id is None:
        return
    given = row.prompt_ids if row.prompt is None else row.prompt
    prompt = hashlib.blake2b(json.dumps(given, sort_keys=True, default=str).encode(), digest_size=16).digest()
    where, same = ids.setdefault(row.id, (row.where, prompt))
    if where != row.where:
        also = "" if same == prompt else ", with another prompt"
        raise UserError(
            f"{row.where}, field 'id': {row.id!r} is the id of another group too{also} ({where}); an id is for one "
            "draw: remove one of them, or give it an id of its own"
        )


def _group_row(group: Group, where: str) -> Row:
    return Row(group.prompt, group.prompt_ids, group.columns, tuple(group.completions), where, group.id)


def _mapping_row(row: Mapping[str, Any], where: str, prompt_column: str) -> Row:
    if row.get(prompt_column) is None and row.get("prompt_ids") is None:
        raise FieldError(prompt_column, f"missing (the row has {', '.join(row)}); set prompt_column to the one to use")
    if row.get("completions") is not None:
        group = group_from_dict(_with_prompt(row, prompt_column))
        if group.k < 2:
            raise FieldError("completions", f"{group.k} completion; a group needs two or more to teach anything")
        return _group_row(group, where)
    if row.get("rewards") is not None:
        raise FieldError("rewards", "given without 'completions'")
    # A stand-in completion has the prompt checked by Group's own rules.
    checked = Group(row.get(prompt_column), [Completion(text="")], prompt_ids=row.get("prompt_ids"))
    columns = {key: value for key, value in row.items() if key not in DATASET_KEYS}
    return Row(checked.prompt, checked.prompt_ids, columns, (), where)


def _with_prompt(row: Mapping[str, Any], prompt_column: str) -> dict[str, Any]:
    return {**row, "prompt": row.get(prompt_column)}


def column_names(rows: Iterable[Row]) -> list[str]:
    """Every column that any of the rows has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.columns))


class PromptOrder:
    """The endless order of a dataset's rows: a new permutation every epoch, a function of the seed alone.

    Position n is the n-th row ever drawn; a run that resumes at position n goes on with the same rows.
    """

    def __init__(self, rows: Sequence[Row], seed: int, *, shuffle: bool) -> None:
        self.rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order = np.arange(len(rows))

    def take(self, start: int, count: int) -> list[Row]:
        """Rows number start to start + count."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> Row:
        epoch, place = divmod(position, len(self.rows))
        if self._shuffle and epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return self.rows[int(self._order[place])]
