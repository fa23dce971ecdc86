"""The run folder: config.yaml, metrics.jsonl, timings.jsonl, completions/, checkpoints/, model/, summary.json."""

from __future__ import annotations

import errno
import json
import os
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

    Raises UserError if the folder holds another run (and this one does not resume), or the disk is full.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {str(path)!r}: is a file; name a folder")
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"output_dir {str(path)!r}: already holds a run or other files; "
                "choose another folder, or go on with resume_from_checkpoint"
            )

    def create(self, config: str) -> None:
        """Make the folder, and keep the config in it."""
        if self.path is None:
            return
        with disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(config, encoding="utf-8")

    def keep_rows(self, updates: int) -> list[dict[str, Any]]:
        """Cut metrics and timings back to the first `updates` updates, and return the metrics that are left.

        What is cut off, a resumed run will write again; so it will a last line that a crash left unfinished.
        """
        metrics, _ = (self._keep_rows(name, updates) for name in ("metrics.jsonl", "timings.jsonl"))
        return metrics

    def _keep_rows(self, name: str, updates: int) -> list[dict[str, Any]]:
        if self.path is None or not (self.path / name).exists():
            return []
        file = self.path / name
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [row for row in rows if row["update"] <= updates]
        with disk(file):
            replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """One row to metrics.jsonl or timings.jsonl, on disk at once."""
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

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        folder = None if self.path is None else self.path / "checkpoints"
        if folder is None or not folder.is_dir():
            return []
        found = [entry for entry in folder.glob("step-*") if entry.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete, replacing an old one; after an error, nothing of it."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk(target):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Full disks and refused permissions as one line that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                f"{path}: no space left on the disk; free some and resume: the last complete checkpoint is intact"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path}: cannot be written ({error}); choose another output_dir") from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Ask the system to have the file on disk before going on."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
