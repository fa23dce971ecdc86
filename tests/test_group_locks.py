"""One file of groups and several processes: appended to, read and rewritten at once, with nothing lost or torn."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gvpo import group_files
from gvpo.errors import UserError
from gvpo.group_files import append_groups, locked_file, read_groups, rewrite_groups, write_groups
from gvpo.groups import Completion, Group

LOCKS = Path("/proc/locks")

APPENDER = """
import sys
from gvpo.group_files import append_groups
from gvpo.groups import Completion, Group
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for n in range(count):
    append_groups([Group("p", [Completion("x" * 20000)], id=f"{name}{n}")], path)
"""


def named(*names: str) -> list[Group]:
    return [Group("p", [Completion("a")], id=name) for name in names]


def ids(path: Path) -> list[str | None]:
    return [group.id for group in read_groups(path)]


def rewarded(groups: Iterable[Group]) -> Iterator[Group]:
    for group in groups:
        group.completions[0].reward = 1.0
        yield group


def start_appender(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, str(path), name, str(count)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    return worker


def test_two_processes_append_while_a_third_rewrites_and_reads(tmp_path: Path) -> None:
    path, count = tmp_path / "groups.jsonl", 300
    append_groups(named("first"), path)
    workers = [start_appender(path, name, count) for name in "ab"]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    rewritten = 0
    while any(worker.poll() is None for worker in workers):
        rewrite_groups(path, rewarded)
        rewritten += 1
        list(read_groups(path))  # half a line would be an error
    assert [worker.wait() for worker in workers] == [0, 0]
    rewrite_groups(path, rewarded)
    assert rewritten and sorted(map(str, ids(path))) == sorted(
        ["first", *(f"{w}{n}" for w in "ab" for n in range(count))]
    )
    assert all(group.rewards == [1.0] for group in read_groups(path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_appended_while_a_file_is_rewritten_stays_behind_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a", "b"), path)

    def change(groups: Iterator[Group]) -> Iterator[Group]:
        yield from rewarded([next(groups)])
        append_groups(named("c", "d"), path)
        yield from rewarded(groups)

    assert rewrite_groups(path, change) == 2
    assert [(group.id, group.rewards) for group in read_groups(path)] == [
        ("a", [1.0]),
        ("b", [1.0]),
        ("c", [None]),
        ("d", [None]),
    ]


@pytest.mark.parametrize("extension", [".jsonl", ".parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("no")])
def test_an_error_while_rewriting_leaves_the_file_and_nothing_else(tmp_path: Path, extension: str, error: Any) -> None:
    path = tmp_path / f"groups{extension}"
    write_groups(named("a", "b"), path)
    before = path.read_bytes()

    def change(groups: Iterator[Group]) -> Iterator[Group]:
        yield next(groups)
        raise error

    with pytest.raises(BaseException) as caught:
        rewrite_groups(path, change)
    assert isinstance(caught.value, KeyboardInterrupt | UserError)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_replaced_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)

    def change(groups: Iterator[Group]) -> Iterator[Group]:
        write_groups(named("theirs"), path)
        yield from groups

    with pytest.raises(UserError, match="was replaced while it was read; nothing is changed"):
        rewrite_groups(path, change)
    assert ids(path) == ["theirs"] and list(tmp_path.iterdir()) == [path]


def test_one_process_rewrites_a_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)

    def change(groups: Iterator[Group]) -> Iterator[Group]:
        with pytest.raises(UserError, match="another process is rewriting it"):
            rewrite_groups(path, rewarded)
        yield from rewarded(groups)

    rewrite_groups(path, change)
    assert [group.rewards for group in read_groups(path)] == [[1.0]]


def test_what_a_killed_rewriter_left_is_not_taken_for_the_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)
    (tmp_path / ".groups.jsonl.rewriting").write_text("half a l")
    rewrite_groups(path, rewarded)
    assert ids(path) == ["a"] and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_permissions_stay(tmp_path: Path) -> None:
    (path := tmp_path / "groups.jsonl").symlink_to(tmp_path / "real.jsonl")
    append_groups(named("a"), path)
    os.chmod(path, 0o640)
    rewrite_groups(path, rewarded)
    assert path.is_symlink() and (tmp_path / "real.jsonl").stat().st_mode & 0o777 == 0o640
    assert [group.rewards for group in read_groups(path)] == [[1.0]]


@pytest.mark.skipif(not LOCKS.exists(), reason="needs the kernel's list of locks")
def test_an_append_that_waited_for_a_rewrite_goes_into_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)
    with locked_file(path, "rb+"):
        worker = start_appender(path, "b", 1)
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        while not _waits(worker.pid):  # in flock, on the file that is replaced now
            assert worker.poll() is None
        write_groups(named("new"), path)
    assert worker.wait() == 0
    assert ids(path) == ["new", "b0"]


def _waits(pid: int) -> bool:
    """Whether a process waits for a lock, by the kernel's list of them."""
    return any("->" in line and f" {pid} " in line for line in LOCKS.read_text().splitlines())


@pytest.mark.skipif(not LOCKS.exists(), reason="needs the kernel's list of locks")
def test_a_reader_never_sees_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a", "b"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    reading = subprocess.Popen(
        [sys.executable, "-c", _READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with locked_file(path, "rb+") as file:
        assert reading.stdin is not None
        reading.stdin.write("go\n")
        reading.stdin.flush()
        while not _waits(reading.pid):
            assert reading.poll() is None
        file.seek(0)
        file.write(whole)
        file.flush()
    out, _ = reading.communicate()
    assert json.loads(out) == ["a", "b"]


_READER = """
import json, sys
from gvpo.group_files import read_groups
sys.stdin.readline()
print(json.dumps([group.id for group in read_groups(sys.argv[1])]))
"""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_takes_back_the_line_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)
    before, write = path.read_bytes(), os.write
    written: list[int] = []

    def full(descriptor: int, data: Any) -> int:
        if written:
            raise OSError(number, "no")
        written.append(write(descriptor, data[:7]))
        return written[0]

    monkeypatch.setattr(group_files.os, "write", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        append_groups(named("b"), path)
    assert path.read_bytes() == before


def test_a_full_disk_while_rewriting_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "groups.jsonl"
    append_groups(named("a"), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(group_files.os, "fsync", full)
    for use in (lambda: rewrite_groups(path, rewarded), lambda: write_groups(named("b"), path)):
        with pytest.raises(UserError, match="no space left on the disk"):
            use()
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(group_files.fcntl, "flock", none)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\)"):
        append_groups(named("a"), tmp_path / "groups.jsonl")
