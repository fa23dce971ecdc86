"""Where drawn groups go: to the end of a .jsonl file, or into a folder, each batch a file that appears whole.

A writer knows the ids of the groups that are there already, so that what was stopped goes on where it was. Covered: any
number of samplers of different names in one place. Not covered: Parquet, which cannot grow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gvpo.errors import UserError
from gvpo.group_files import append_groups, locked_file, numbered_rows, write_groups
from gvpo.groups import Group


class GroupWriter(Protocol):
    """drawn: ids of the groups that are there."""

    drawn: set[str]

    def write(self, groups: Sequence[Group]) -> None:
        """Add groups, none or all of them whatever happens, but for a file after a crash. Raises UserError."""
        ...


@contextmanager
def open_writer(out: str, name: str) -> Iterator[GroupWriter]:
    """The writer for a path, its own while the block lasts.

    out: a .jsonl file, or a folder: one that exists, or a path that ends with "/". name: of the sampler, the same when
    it is started again; what a kill left of its files is removed.
    Raises UserError for another path, one that cannot be written, and where a sampler of that name is at work.
    """
    path, folder = Path(out), is_folder(out)
    if folder:
        _make(path)
    else:
        _check_file(path)
    lock = path / f".{name}.lock" if folder else path.with_name(f".{path.name}.{name}.lock")
    busy = f"{out}: a sampler with the same model and settings is drawing into it; give another --seed, or wait"
    with locked_file(lock, "ab", busy):
        try:
            yield _folder_writer(path, name) if folder else _file_writer(path)
        finally:
            lock.unlink(missing_ok=True)


def is_folder(out: str) -> bool:
    """Whether the path is meant as a folder."""
    return out.endswith("/") or Path(out).is_dir()


@dataclass
class _FileWriter:
    path: Path
    drawn: set[str]

    def write(self, groups: Sequence[Group]) -> None:
        append_groups(groups, self.path)


@dataclass
class _FolderWriter:
    """Files NAME-000001.jsonl and on, at the first numbers that are not taken."""

    path: Path
    name: str
    drawn: set[str]
    taken: set[int]
    number: int = 1

    def write(self, groups: Sequence[Group]) -> None:
        while self.number in self.taken:
            self.number += 1
        write_groups(groups, self.path / f"{self.name}-{self.number:06d}.jsonl")
        self.taken.add(self.number)


def _file_writer(path: Path) -> _FileWriter:
    if not path.exists():
        return _FileWriter(path, set())
    append_groups([], path)  # refuses what cannot be appended to
    return _FileWriter(path, set(_ids(path)))


def _folder_writer(path: Path, name: str) -> _FolderWriter:
    own = re.compile(rf"{re.escape(name)}-(\d{{6,}})\.jsonl")
    drawn: set[str] = set()
    taken: set[int] = set()
    for file in path.iterdir():
        if match := own.fullmatch(file.name):
            taken.add(int(match[1]))
            drawn.update(_ids(file))
        elif file.name.startswith(f".{name}-") and file.name.endswith(".tmp"):
            file.unlink(missing_ok=True)
    return _FolderWriter(path, name, drawn, taken)


def _ids(path: Path) -> Iterator[str]:
    for where, row in numbered_rows(path):
        if not isinstance(row, Mapping) or not isinstance(row.get("completions"), list):
            raise UserError(f"{where}: not a group, and groups are only appended to groups; name another file")
        if isinstance(name := row.get("id"), str):
            yield name


def _make(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder; name it without the / at the end")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror}); choose another") from error


def _check_file(path: Path) -> None:
    if path.suffix.lower() == ".parquet":
        raise UserError(
            f"{path}: a Parquet file cannot grow group by group; name a .jsonl file, or a folder (with a /)"
        )
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: neither a .jsonl file nor a folder; end a folder that is to be made with a /")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")
