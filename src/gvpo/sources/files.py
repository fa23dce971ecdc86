"""Whole groups from files that others write, also while the run goes on.

A folder's files are taken in the order of their names; of those that appear later, each look's new ones come after.
A file is whole when it appears under its name (an atomic rename: `write_groups` and `gvpo sample` do that); names that
begin with a dot are passed over. Groups that are appended to a file come after its others. Files are read, never
changed or removed. What was taken is a few numbers in the checkpoint: a run that goes on from there takes the groups
after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gvpo.errors import UserError
from gvpo.group_files import numbered_rows
from gvpo.groups import Completion
from gvpo.sources.dataset import Ids, Row, check_id, read_row
from gvpo.sources.specs import FilesSpec

STATE = "files.json"


@dataclass
class _File:
    """One file's groups. taken: how many so far, over all passes; size: in bytes when it was read through and its ids
    were noted, None if it was not."""

    groups: int
    taken: int = 0
    size: int | None = None

    @property
    def passes(self) -> int:
        return self.taken // self.groups


@dataclass
class GroupFiles:
    """The groups of spec.path, each taken spec.uses times at most.

    check: refuses a row that the run cannot use, by a UserError; set when model and tokenizer are known.
    stale: groups that were passed over so far, for being older than spec.max_staleness.
    """

    spec: FilesSpec
    check: Callable[[Row], None] = lambda row: None
    stale: int = 0
    _files: dict[str, _File] = field(default_factory=dict)
    _ids: Ids = field(default_factory=dict)
    _open: tuple[str, int, Iterator[Row]] | None = None

    def look(self) -> None:
        """Take in the files that are new, in the order of their names, and the groups that others have got since.

        Raises UserError for a row that is no group, a group id that was seen, and a folder that cannot be read.
        """
        for path in self._paths():
            known = self._files.get(path.name)
            size = path.stat().st_size if path.exists() else None
            if known is None or known.size is None or known.size != size:
                groups = 0
                for row in self._rows(path):
                    check_id(row, self._ids)
                    groups += 1
                read = _File(groups, size=size)
                self._files[path.name] = read if known is None else self._again(path.name, known, read)
                self._open = None

    @property
    def held(self) -> int:
        """Groups in all files that were seen."""
        return sum(file.groups for file in self._files.values())

    def take(self, count: int, *, update: int) -> list[Row]:
        """The next groups, `count` at most, as rows that bring their own completions.

        Groups that were used less often come first; of equals the first. update: the run's; groups that a policy drew
        more than spec.max_staleness updates before are passed over, and counted.
        """
        rows: list[Row] = []
        while len(rows) < count and (row := self._next()) is not None:
            if self._is_stale(row, update):
                self.stale += 1
            else:
                self.check(row)
                rows.append(replace(row, completions=tuple(map(_from_elsewhere, row.completions))))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What was taken; JSON."""
        return {"stale": self.stale, "files": {name: [file.groups, file.taken] for name, file in self._files.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.stale = state["stale"]
        now, self._open = self._files, None
        # Files in the order in which they were found then; what has appeared since comes after them.
        self._files = {
            name: self._again(name, _File(groups, taken), now.get(name))
            for name, (groups, taken) in state["files"].items()
        }
        self._files |= {name: replace(file, taken=0) for name, file in now.items() if name not in self._files}

    def mark(self) -> Callable[[], None]:
        """What puts back what was taken to what it is now."""
        return partial(self.load_state_dict, self.state_dict())

    def save(self, folder: Path) -> None:
        """Write what was taken into this folder."""
        (folder / STATE).write_text(json.dumps(self.state_dict()), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self.load_state_dict(json.loads((folder / STATE).read_text(encoding="utf-8")))

    def rows(self) -> Iterator[Row]:
        """Every group of the files that were seen, once."""
        for name in self._files:
            yield from self._rows(self._path(name))

    def _next(self) -> Row | None:
        usable = [
            (file.passes, name) for name, file in self._files.items() if file.taken < self.spec.uses * file.groups
        ]
        if not usable:
            return None
        name = min(usable, key=lambda pair: pair[0])[1]
        file = self._files[name]
        place = file.taken % file.groups
        if self._open is None or self._open[:2] != (name, place):
            self._open = (name, place, islice(self._rows(self._path(name)), place, None))
        rows = self._open[2]
        row = next(rows, None)
        if row is None:
            raise UserError(f"{self._path(name)}: has fewer groups than when it was first read; restore the file")
        file.taken += 1
        self._open = (name, place + 1, rows)
        return row

    def _again(self, name: str, known: _File, read: _File | None) -> _File:
        """A file that is known, as it was read anew: groups may have been appended to it."""
        if read is None:
            return known
        if read.groups > known.groups < known.taken:
            raise UserError(
                f"{self._path(name)}: has grown from {known.groups} groups to {read.groups} after some were used "
                "again; put the new ones into a file of their own"
            )
        return _File(max(known.groups, read.groups), known.taken, read.size)

    def _rows(self, path: Path) -> Iterator[Row]:
        for where, values in numbered_rows(path):
            row = read_row(values, where)
            if not row.offline:
                raise UserError(f"{where}, field 'completions': missing; files hold groups with their completions")
            yield row

    def _is_stale(self, row: Row, update: int) -> bool:
        ages = [update - one.meta["update"] for one in row.completions if isinstance(one.meta.get("update"), int)]
        return self.spec.max_staleness is not None and max(ages, default=0) > self.spec.max_staleness

    def _paths(self) -> list[Path]:
        path = Path(self.spec.path)
        if not path.is_dir():
            if self.spec.follow:
                what = "is a file, and only a folder can be followed" if path.exists() else "no such folder to follow"
                raise UserError(f"{path}: {what}; name the folder that samplers write to, or make it (files: path)")
            if not path.exists():
                raise UserError(
                    f"{path}: no such file or folder; check the path (the working directory is {Path.cwd()})"
                )
            return [path]
        found = [file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet") and file.name[0] != "."]
        return sorted(found)

    def _path(self, name: str) -> Path:
        path = Path(self.spec.path)
        return path / name if path.is_dir() else path


def _from_elsewhere(one: Completion) -> Completion:
    """What a sampler calls the policy's is not drawn by this run: metrics tell the two apart."""
    return replace(one, source="files") if one.source == "policy" else one
