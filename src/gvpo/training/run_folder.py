"""The run folder: config.yaml, metrics.jsonl, timings.jsonl, completions/, checkpoints/, model/, summary.json."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gvpo.errors import UserError
from gvpo.group_files import write_groups
from gvpo.groups import Group


class RunFolder:
    """The files of one run. path None: nothing is written.

    Raises UserError as `check_output_dir` does, or if the disk is full.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        check_output_dir(path, resume=resume)
        self.path = None if path is None else Path(path)

    def create(self, config: str) -> None:
        """Make the folder, and keep the config in it."""
        if self.path is None:
            return
        with disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.path / "config.yaml", config)

    def cut_back(self, update: int, rollout: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Make the folder what it was after this update and rollout: what came later is made again.

        history: the rows of metrics.jsonl until then, which it will hold, in a new folder too. Later checkpoints
        and published policies go: they are of a branch that is given up. So does what a crash left unfinished: a line,
        a file, a folder.
        """
        if self.path is None:
            return
        with disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # Read first: a file that cannot be read stops here, before anything is gone.
            timings = self._rows_until(self.path / "timings.jsonl", history[-1]["update"] if history else -1)
            # A checkpoint needs the completions up to it: it goes before them.
            for folder in reversed(checkpoints(self.path)):
                if _number(folder) > update:
                    remove_folder(folder)
            for folder in (self.path / "policy").glob("update-*"):
                if folder.name.removeprefix("update-").isdigit() and _number(folder) > update:
                    remove_folder(folder)
            for name, rows in (("metrics.jsonl", history), ("timings.jsonl", timings)):
                replace_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))
            for kind, last in (("rollout", rollout), ("eval", update)):
                for file in (self.path / "completions").glob(f"{kind}-*.jsonl"):
                    if file.stem.removeprefix(f"{kind}-").isdigit() and _number(file) > last:
                        file.unlink()
            for leftover in leftovers(self.path):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _rows_until(self, file: Path, update: int) -> list[dict[str, Any]]:
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [row for line in lines if line.endswith("\n") and (row := json.loads(line))["update"] <= update]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: not the rows of a run ({error}); restore the file, or remove it") from error

    def sync_completions(self) -> None:
        """Wait until the disk has the names of the completions' files: a checkpoint counts on them."""
        if self.path is not None and (self.path / "completions").is_dir():
            with disk(self.path):
                sync(self.path / "completions")

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """One row to metrics.jsonl or timings.jsonl, handed to the system at once."""
        if self.path is not None:
            with disk(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def write_completions(self, name: str, groups: Sequence[Group]) -> None:
        """Scored groups: a rollout's, or an evaluation's."""
        if self.path is not None:
            folder = self.path / "completions"
            with disk(folder):
                folder.mkdir(exist_ok=True)
                write_groups(groups, folder / f"{name}.jsonl")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, whole or not at all."""
        if self.path is not None:
            with disk(self.path):
                replace_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")


def check_output_dir(path: str | Path | None, *, resume: bool) -> None:
    """Refuse a path that cannot be a folder, or that holds another run or other files while this run does not resume.

    A config alone is what a run leaves that failed before its first rewards: it is in nobody's way.
    Raises UserError. None is a run that writes nothing.
    """
    if path is None:
        return
    folder = Path(path)
    with disk(folder):
        above = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        if not above.is_dir():
            raise UserError(f"output_dir {str(path)!r}: {above} is not a folder; name a folder")
        if not os.access(above, os.W_OK):
            raise UserError(f"output_dir {str(path)!r}: {above} cannot be written to; choose another folder")
        held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        held -= {leftover.name for leftover in leftovers(folder)}
    if not resume and not held <= {"config.yaml"}:
        raise UserError(
            f"output_dir {str(path)!r}: already holds a run or other files; "
            "choose another folder, or go on with resume_from_checkpoint"
        )


def checkpoints(path: str | Path | None) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folders = [] if path is None else (Path(path) / "checkpoints").glob("step-*")
    return sorted((folder for folder in folders if folder.name.removeprefix("step-").isdigit()), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


_UNFINISHED = re.compile(
    r"\.((model|(step|update)-\d+)\.(tmp|old)|(config\.yaml|summary\.json|(metrics|timings)\.jsonl)\.tmp"
    r"|(rollout|eval)-\d+\.jsonl\.[0-9a-f]+\.tmp)"
)
"""Names under which a run makes its files and folders, and from which it deletes them."""


def leftovers(path: Path) -> list[Path]:
    """What a killed run left in its folder under hidden names, half written or half deleted."""
    folders = [path, *(path / name for name in ("checkpoints", "completions", "policy"))]
    return [
        entry
        for folder in folders
        if folder.is_dir()
        for entry in folder.iterdir()
        if _UNFINISHED.fullmatch(entry.name)
    ]


def remove_folder(folder: Path) -> None:
    """Delete a folder, that it is whole or not there under its name."""
    gone = folder.with_name(f".{folder.name}.old")
    if gone.exists():
        shutil.rmtree(gone)
    os.replace(folder, gone)
    sync(folder.parent)
    shutil.rmtree(gone)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete; after an error, nothing of it.

    It replaces an old one, which is gone for a moment then: a kill just there leaves neither.
    """
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk(target):
            temporary.mkdir(parents=True)
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                sync(entry)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)
            os.replace(temporary, target)
            for parent in (target.parent, target.parent.parent):
                sync(parent)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the disk refuses, as one line that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                f"{path}: no space left on the disk; free some and resume: every complete checkpoint is intact"
            ) from error
        raise UserError(f"{path}: cannot be written ({error}); choose another place, or make room for it") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has the file, or the names in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
