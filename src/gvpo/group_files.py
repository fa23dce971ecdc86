"""Groups in files, JSON lines or Parquet: read one at a time, written in one piece, never all in memory.

Covered: rows as `groups.group_from_dict` takes them; any number of processes that append to one .jsonl file while
others read it and one rewrites it, by flock(2). Not covered: compressed JSON lines, folders of shards; several writers
on Windows, which has no flock.
"""

from __future__ import annotations

import codecs
import errno
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from gvpo.errors import FieldError, UserError, located
from gvpo.groups import Group, group_from_dict, group_to_dict

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_ROW_GROUP = 256  # groups held in memory while a Parquet file is written: 8 x 4096 ids each make 64 MiB
ROWS_PER_READ = 16


def read_groups(path: str | os.PathLike[str]) -> Iterator[Group]:
    """The groups of a .jsonl or .parquet file, one after the other; constant memory.

    Rows are those of `group_from_dict`. JSON lines: UTF-8 with or without a byte-order mark, blank lines skipped.
    Parquet: what `write_groups` makes, or a dataset's columns `prompt`, `completions`, `rewards` and further ones.

    Raises UserError: at the call for a path that is no such file; while reading, naming the line (JSON lines) or row
    (Parquet), from 1, for a row that is no group; at the end for a file without rows.
    """
    path = Path(path)
    return _groups(path, numbered_rows(path))


def numbered_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl or .parquet file as they stand, each after where it is ("data.jsonl, line 3").

    Constant memory. Raises UserError as `read_groups` does, but for what the rows hold.
    """
    path = Path(path)
    rows = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[_format(path)]
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a .jsonl or .parquet file")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path (the working directory is {Path.cwd()})")
    return rows(path)


def write_groups(groups: Iterable[Group], path: str | os.PathLike[str]) -> int:
    """Writes the groups, taken one at a time, to a .jsonl or .parquet file and returns how many they were.

    The file appears, or replaces the old one, when all are written; after an error there is no trace of the attempt.
    Tuples in meta, columns and messages come back as lists, and keys inside them as strings.

    The Parquet schema is fixed and typed, but messages, meta and columns are JSON in string columns: they may hold
    anything nested, different from row to row, and a Parquet schema would have to unite all rows before the first is
    written, filling every gap with nulls that cannot be told from given ones.

    Raises UserError for a path that cannot be written, or naming the group, from 1, and the field that cannot.
    """
    path = Path(path)
    write = {".jsonl": _write_jsonl, ".parquet": _write_parquet}[_format(path)]
    _check_target(path)
    with _replacing(path) as file:
        return write(_numbered(groups, path), file)


def append_groups(groups: Iterable[Group], path: str | os.PathLike[str]) -> int:
    """Appends the groups to a .jsonl file, made if missing, one locked write per line; returns how many they were.

    Any number of processes may append to one file, also while `rewrite_groups` replaces it: no line is lost, or torn.
    A crash loses at most the line being written; a full disk leaves the file as it was before that line. Raises
    UserError as `write_groups` does, and for a file whose last line was left unfinished.
    """
    path = Path(path)
    if _format(path) != ".jsonl":
        raise UserError(f"{path}: a Parquet file cannot be appended to; name a .jsonl file, or use write_groups")
    _check_target(path)
    _append(b"", path)  # what cannot be appended to is refused before the first group is made
    n = 0
    for where, row in _numbered(groups, path):
        _append(_line(where, row), path)
        n += 1
    return n


def rewrite_groups(path: str | os.PathLike[str], change: Callable[[Iterator[Group]], Iterable[Group]]) -> int:
    """Puts in place of a file's groups what `change` makes of them, all in one piece or, after an error, nothing.

    Constant memory if `change` takes and gives the groups one at a time. Lines that other processes append to a
    .jsonl file meanwhile are kept behind, as they are; returns their number. Raises UserError as `read_groups` and
    `write_groups` do, and where another process rewrites or replaces the file.
    """
    path = Path(os.path.realpath(path))  # else a link would be replaced, not the file
    groups = read_groups(path)
    if _format(path) == ".parquet":
        write_groups(change(groups), path)
        return 0
    scratch = path.with_name(f".{path.name}.rewriting")
    busy = f"{path}: another process is rewriting it; wait until it is done"
    with _writing(path), _opened(path, "rb") as old, locked_file(scratch, "ab", busy) as new:
        try:
            with locked_file(path, "rb+") as now:
                end = _size(now)  # of whole lines, as nobody is writing one
            new.truncate(0)  # what a crash left
            groups = _groups(path, _jsonl_rows(path, old, end))
            _write_jsonl(_numbered(change(groups), path), new)
            with locked_file(path, "rb+") as now:
                if not _is_at(old, path) or _size(now) < end:
                    raise UserError(f"{path}: was replaced while it was read; nothing is changed, try again")
                now.seek(end)
                late = sum(new.write(line) > 0 for line in now)
                new.flush()
                os.fsync(new.fileno())
                shutil.copymode(path, scratch)
                os.replace(scratch, path)
            return late
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextmanager
def locked_file(path: Path, mode: str, busy: str | None = None) -> Iterator[BinaryIO]:
    """The file that is at path, opened in that mode, once no other process holds it; held until the block ends.

    busy: where another holds it, refuse with this line instead of waiting. Raises UserError.
    """
    while True:
        with _opened(path, mode) as file:
            _lock(file, path, busy)
            if _is_at(file, path):
                yield file
                return
        # Replaced or removed while this process waited: the next round has the new one.


def _lock(file: BinaryIO, path: Path, busy: str | None) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError as error:
        raise UserError(busy or str(error)) from error
    except OSError as error:
        reason = f"{path}: cannot be locked ({error.strerror})"
        raise UserError(f"{reason}; use a file system with locks, such as a local disk") from error


def _append(line: bytes, path: Path) -> None:
    with locked_file(path, "ab+") as file:
        if not _at_line_start(file):
            raise UserError(f"{path}: the last line has no line end, {_LOOKS_TRUNCATED}, or end it with a newline")
        before, left = _size(file), memoryview(line)
        try:
            with _writing(path):
                while left:  # past the buffer, which would write again, on closing, what a full disk did not take
                    left = left[os.write(file.fileno(), left) :]
        except BaseException:
            os.ftruncate(file.fileno(), before)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk refuses, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "no space left on the disk; free some and go on, what was there before is intact"
            raise UserError(f"{path}: {problem}") from error
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


_LOOKS_TRUNCATED = "so it looks truncated, as by a crash while writing; delete that line"


def _format(path: Path) -> str:
    extension = path.suffix.lower()
    if extension not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: unknown extension {extension!r}; groups are kept in .jsonl or .parquet files")
    return extension


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; make it first")


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, open(path, mode))
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from error


def _at_line_start(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _groups(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[Group]:
    where = None
    for where, row in rows:
        with located(where):
            group = group_from_dict(row)
        yield group
    if where is None:
        raise UserError(f"{path}: no rows, the file is empty; write at least one group")


def _numbered(groups: Iterable[Group], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for n, group in enumerate(groups, 1):
        where = f"{path}, group {n}"
        with located(where):
            row = group_to_dict(group)
        yield where, row


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside path that takes its place at the end, and vanishes after an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _writing(path):
            with _opened(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _to_json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in meta or columns: only an escape can hold it
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}; keep meta, columns and messages to what JSON can hold") from error
    return text


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
        raise UserError(f"not JSON ({error})") from error


# JSON lines


def _jsonl_rows(path: Path, file: BinaryIO | None = None, end: float = math.inf) -> Iterator[tuple[str, Any]]:
    """The rows of the lines that begin before byte `end`; file: opened already, to be read from its beginning."""
    with _opened(path, "rb") if file is None else nullcontext(file) as lines:
        for n, line in enumerate(_lines(lines, end), 1):
            text = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
            if text.strip():
                where = f"{path}, line {n}"
                with located(where):
                    row = _parsed(text)
                yield where, row


def _lines(file: BinaryIO, end: float) -> Iterator[bytes]:
    """Lines as bytes, as text mode would also end them at a lone carriage return; none that is only half appended."""
    at = 0
    while at < end and (line := file.readline()):
        if not line.endswith(b"\n") and file.seekable():
            _wait_for_writers(file)
            file.seek(at)
            line = file.readline()
        at += len(line)
        yield line


def _wait_for_writers(file: BinaryIO) -> None:
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks has no writers that use them
            fcntl.flock(file, fcntl.LOCK_SH)
            fcntl.flock(file, fcntl.LOCK_UN)


def _parsed(line: bytes) -> Any:
    try:
        return _from_json(line.decode())
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # which no line with its line end can give
            byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            raise UserError(f"not UTF-8 ({byte}); save the file as UTF-8") from error
        raise UserError(f"the last line breaks off within a character, {_LOOKS_TRUNCATED}") from error
    except UserError as error:
        if line.endswith(b"\n"):
            raise UserError(f"{error}; each line is one JSON object") from error
        raise UserError(f"{error}, and the last line has no line end, {_LOOKS_TRUNCATED}") from error


def _write_jsonl(rows: Iterable[tuple[str, dict[str, Any]]], file: BinaryIO) -> int:
    n = 0
    for where, row in rows:
        file.write(_line(where, row))
        n += 1
    return n


def _line(where: str, row: dict[str, Any]) -> bytes:
    with located(where):
        return _to_json(row).encode() + b"\n"


# Parquet


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_READ):
                for row in batch.to_pylist():
                    n += 1
                    where = f"{path}, row {n}"
                    with located(where):
                        row = _from_parquet_row(row)
                    yield where, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: not readable as Parquet ({reason}); write the file again") from error


def _write_parquet(rows: Iterable[tuple[str, dict[str, Any]]], file: BinaryIO) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _parquet_schema()
    rows = iter(rows)
    n = 0
    with pq.ParquetWriter(file, schema) as writer:
        while batches := [
            pa.RecordBatch.from_pylist([_to_parquet_row(where, row)], schema=schema)  # 8 bytes per id, Python's take 36
            for where, row in itertools.islice(rows, ROWS_PER_ROW_GROUP)
        ]:
            writer.write_table(pa.Table.from_batches(batches))
            n += len(batches)
    return n


def _parquet_schema() -> pa.Schema:
    import pyarrow as pa

    ids = pa.list_(pa.int64())
    completion = {
        "text": pa.string(),
        "token_ids": ids,
        "reward": pa.float64(),
        "source": pa.string(),
        "ref_logprob": pa.float64(),
        "truncated": pa.bool_(),
        "loss_mask": pa.list_(pa.bool_()),
        "meta": pa.string(),
        "ref_token_logprobs": pa.list_(pa.float64()),
        "old_token_logprobs": pa.list_(pa.float64()),
    }
    group = {
        "id": pa.string(),
        "prompt": pa.string(),
        "prompt_messages": pa.string(),
        "prompt_ids": ids,
        "completions": pa.list_(pa.struct(list(completion.items()))),
        "columns": pa.string(),
    }
    return pa.schema(list(group.items()))


def _to_parquet_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    text, messages = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    with located(where):
        return row | {
            "prompt": text,
            "prompt_messages": _encoded(messages),
            "completions": [
                _PARQUET_DEFAULTS | member | {"meta": _encoded(member.get("meta"))} for member in row["completions"]
            ],
            "columns": _encoded(row.get("columns")),
        }


_PARQUET_DEFAULTS = {"source": "policy", "truncated": False}  # written out, for readers that do not know the defaults


def _from_parquet_row(row: dict[str, Any]) -> dict[str, Any]:
    members = row.get("completions")
    if not members or not isinstance(members[0], Mapping):
        return row  # a dataset's own: strings
    row = row | {name: _decoded(row.get(name), name) for name in ("columns", "prompt_messages")}
    messages = row.pop("prompt_messages")
    if row.get("prompt") is None:
        row["prompt"] = messages
    return row | {"completions": [_with_meta(i, member) for i, member in enumerate(members)]}


def _with_meta(i: int, member: dict[str, Any] | None) -> dict[str, Any] | None:
    return member and member | {"meta": _decoded(member.get("meta"), f"completions[{i}].meta")}


def _encoded(value: Any) -> str | None:
    return None if value is None else _to_json(value)


def _decoded(value: Any, field: str) -> Any:
    try:
        return _from_json(value) if isinstance(value, str) else value
    except UserError as error:
        raise FieldError(field, f"{error}; it holds JSON as text") from error
