"""Groups in files: round trips, constant memory, atomic writes, and one line for every broken file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gvpo import group_files
from gvpo.errors import UserError
from gvpo.group_files import append_groups, numbered_rows, read_groups, write_groups
from gvpo.groups import Completion, Group, group_to_dict

FORMATS = [".jsonl", ".parquet"]

texts = st.text() | st.text('\n\r\x0b\x0c\x1c\x85\u2028\u2029\ufeff\x00"\\{}a\U0001f600')
finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**63 - 1), max_size=4)
keys = st.text(max_size=5)
nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(keys, nested, max_size=3)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    token_ids = draw(st.none() | ids)

    def per_token(entries: st.SearchStrategy[Any]) -> Any:
        if token_ids is None:
            return None
        return draw(st.none() | st.lists(entries, min_size=len(token_ids), max_size=len(token_ids)))

    return Completion(
        draw(texts if token_ids is None else st.none() | texts),
        token_ids,
        reward=draw(st.none() | finite),
        source=draw(texts.filter(len)),
        ref_logprob=draw(st.none() | finite),
        truncated=draw(st.booleans()),
        loss_mask=per_token(st.booleans()),
        meta=draw(objects),
        ref_token_logprobs=per_token(finite),
        old_token_logprobs=per_token(finite),
    )


messages = st.builds(lambda extra, role, content: extra | {"role": role, "content": content}, objects, texts, texts)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    prompt_ids = draw(st.none() | ids.filter(len))
    prompt = texts | st.lists(messages, min_size=1, max_size=2)
    return Group(
        draw(prompt if prompt_ids is None else st.none() | prompt),
        draw(st.lists(completions(), min_size=1, max_size=3)),
        prompt_ids=prompt_ids,
        id=draw(st.none() | texts),
        columns=draw(objects),
    )


def pair(name: str, **columns: Any) -> Group:
    return Group("p", [Completion("a", reward=1.0), Completion("b")], id=name, columns=columns)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def save(path: Path, *lines: str | bytes, end: str = "\n") -> Path:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join(encoded) + end.encode())
    return path


def reading(path: Path) -> str:
    """The one line that reading all of the file ends with, its folder left out."""
    return message(lambda: list(read_groups(path))).replace(f"{path.parent}{os.sep}", "")


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


GOOD = '{"prompt": "p", "completions": ["a", "b"]}'


@pytest.mark.parametrize("extension", FORMATS)
@given(written=st.lists(groups(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, extension: str, written: list[Group]) -> None:
    path = tmp_path / f"groups{extension}"
    assert write_groups(iter(written), path) == len(written)
    read = list(read_groups(path))
    assert read == written
    assert repr(read) == repr(written), "equal values of other types: 1 == 1.0 == True, 0.0 == -0.0"


def test_each_json_line_is_the_row_of_one_group_in_plain_unicode(tmp_path: Path) -> None:
    group = Group([{"role": "user", "content": "ä\u2028\n"}], [Completion("é")], columns={"x": [1]})
    write_groups([group, pair("second")], tmp_path / "groups.jsonl")
    first, second, rest = (tmp_path / "groups.jsonl").read_bytes().decode().split("\n")
    assert (json.loads(first), json.loads(second), rest) == (group_to_dict(group), group_to_dict(pair("second")), "")
    assert "ä\u2028\\n" in first
    assert "é" in first


@pytest.mark.parametrize("extension", FORMATS)
def test_half_a_surrogate_pair_in_meta_or_columns_survives(tmp_path: Path, extension: str) -> None:
    group = Group("ä", [Completion("a", meta={"m": "\ud83d"})], columns={"c": ["\udc00"]})
    write_groups([group], tmp_path / f"groups{extension}")
    assert list(read_groups(tmp_path / f"groups{extension}")) == [group]


def test_parquet_schema_is_fixed_and_typed(tmp_path: Path) -> None:
    plain = tmp_path / "plain.parquet"
    write_groups([Group("p", [Completion("a")])], plain)
    full = tmp_path / "full.parquet"
    chat = [{"role": "user", "content": "ä"}]
    member = Completion("a", [1], reward=1, ref_logprob=-1, loss_mask=[True], meta={"a": 1})
    write_groups([Group(chat, [member], prompt_ids=[1], id="x", columns={"b": {"c": 2}})], full)
    assert pq.read_schema(plain) == pq.read_schema(full)
    assert str(pq.read_schema(plain).field("completions").type).replace("element", "item") == (
        "list<item: struct<text: string, token_ids: list<item: int64>, reward: double, source: string, "
        "ref_logprob: double, truncated: bool, loss_mask: list<item: bool>, meta: string, "
        "ref_token_logprobs: list<item: double>, old_token_logprobs: list<item: double>>>"
    )
    [row] = pq.read_table(full).to_pylist()
    assert (row["prompt"], json.loads(row["prompt_messages"]), json.loads(row["columns"])) == (
        None,
        chat,
        {"b": {"c": 2}},
    )
    assert json.loads(row["completions"][0]["meta"]) == {"a": 1}
    [row] = pq.read_table(plain).to_pylist()
    assert (row["prompt"], row["prompt_messages"], row["columns"], row["id"], row["prompt_ids"]) == ("p", *[None] * 4)
    names = ("token_ids", "reward", "ref_logprob", "loss_mask", "meta", "ref_token_logprobs", "old_token_logprobs")
    nulls = dict.fromkeys(names)
    assert row["completions"] == [nulls | {"text": "a", "source": "policy", "truncated": False}]


@pytest.mark.parametrize("extension", [".jsonl", ".JSONL"])
def test_reading_is_lazy(tmp_path: Path, extension: str) -> None:
    reader = read_groups(save(tmp_path / f"groups{extension}", GOOD, "broken", GOOD))
    assert next(reader).completions[0].text == "a"
    assert "line 2" in message(lambda: next(reader))


def test_json_lines_are_read_from_the_file_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    write_groups([pair("a"), pair("b")], path)
    reader = read_groups(path)
    assert next(reader).id == "a"
    append_groups([pair("c")], path)
    assert [group.id for group in reader] == ["b", "c"]


def test_reading_parquet_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    convert = group_files._from_parquet_row
    monkeypatch.setattr(group_files, "_from_parquet_row", lambda row: converted.append(1) or convert(row))
    write_groups((pair(str(i)) for i in range(5)), tmp_path / "groups.parquet")
    reader = read_groups(tmp_path / "groups.parquet")
    assert [next(reader).id, next(reader).id] == ["0", "1"]
    assert len(converted) == 2


def test_json_lines_are_written_as_the_groups_come(tmp_path: Path) -> None:
    long = "x" * 2**20  # more than any buffer holds

    def source() -> Iterator[Group]:
        for i in range(3):
            [temporary] = tmp_path.iterdir()
            assert temporary.stat().st_size >= i * len(long)
            yield Group(long, [Completion("a")])

    assert write_groups(source(), tmp_path / "groups.jsonl") == 3


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parquet_is_written_in_row_groups_as_the_groups_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr(group_files, "ROWS_PER_ROW_GROUP", 2)
    monkeypatch.setattr(group_files, "ROWS_PER_READ", 3)
    sizes: list[int] = []

    def source() -> Iterator[Group]:
        for i in range(n):
            [temporary] = tmp_path.iterdir()
            sizes.append(temporary.stat().st_size)
            yield Group(os.urandom(2**16).hex(), [Completion("a")], id=str(i))  # random, so that it does not compress

    path = tmp_path / "groups.parquet"
    assert write_groups(source(), path) == n
    metadata = pq.ParquetFile(path).metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert rows == {1: [1], 2: [2], 5: [2, 2, 1]}[n]
    # hex digits carry half a byte each, so a row group of 2 x 2^17 of them takes at least 2^17 bytes however packed
    assert all(size >= (i // 2) * 2**17 for i, size in enumerate(sizes))
    assert [group.id for group in read_groups(path)] == [str(i) for i in range(n)]


@pytest.mark.parametrize("extension", FORMATS)
def test_a_file_can_be_rewritten_from_itself(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"groups{extension}"
    write_groups([pair("a"), pair("b"), pair("c")], path)
    assert write_groups((group for group in read_groups(path) if group.id != "b"), path) == 2
    assert [group.id for group in read_groups(path)] == ["a", "c"]


@pytest.mark.parametrize("extension", FORMATS)
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"groups{extension}"
    write_groups([pair("old")], path)
    before = path.read_bytes()

    def broken() -> Iterator[Group]:
        yield pair("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_groups(broken(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("extension", FORMATS)
def test_the_file_appears_when_it_is_complete(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"groups{extension}"

    def source() -> Iterator[Group]:
        yield pair("a")
        assert not path.exists()
        yield pair("b")

    assert write_groups(source(), path) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_groups([pair("a")], tmp_path / "groups.jsonl")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_append_adds_one_flushed_line_a_group(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"

    def source() -> Iterator[Group]:
        for i in range(3):
            assert path.read_bytes().count(b"\n") == 1 + i
            yield pair(str(i))

    assert append_groups([pair("first")], path) == 1
    assert append_groups(source(), path) == 3
    assert [group.id for group in read_groups(path)] == ["first", "0", "1", "2"]


@pytest.mark.parametrize("tail", ["x", '{"prompt": "p", "compl', GOOD])
def test_append_refuses_an_unfinished_last_line(tmp_path: Path, tail: str) -> None:
    path = save(tmp_path / "groups.jsonl", tail, end="")
    expected = "the last line has no line end, so it looks truncated, as by a crash while writing; delete that line"
    assert message(lambda: append_groups([pair("a")], path)) == f"{path}: {expected}, or end it with a newline"
    assert path.read_text() == tail


def test_append_is_for_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "groups.parquet"
    assert message(lambda: append_groups([pair("a")], path)) == (
        f"{path}: a Parquet file cannot be appended to; name a .jsonl file, or use write_groups"
    )


@pytest.mark.parametrize("write", [write_groups, append_groups])
def test_refuses_a_target_that_cannot_be(tmp_path: Path, write: Callable[..., int]) -> None:
    (folder := tmp_path / "folder.jsonl").mkdir()
    assert message(lambda: write([pair("a")], folder)) == f"{folder}: is a directory; name a file in it"
    orphan = tmp_path / "none" / "groups.jsonl"
    assert message(lambda: write([pair("a")], orphan)) == (
        f"{orphan}: the folder {orphan.parent} does not exist; make it first"
    )
    (target := tmp_path / "target.jsonl").symlink_to(tmp_path / "none" / "missing.jsonl")
    if write is append_groups:
        assert message(lambda: write([pair("a")], target)).startswith(f"{target}: cannot be opened (No such file or")


@pytest.mark.parametrize(
    ("write", "extension"), [(write_groups, ".jsonl"), (write_groups, ".parquet"), (append_groups, ".jsonl")]
)
def test_names_the_group_that_cannot_be_written(tmp_path: Path, write: Callable[..., int], extension: str) -> None:
    path = tmp_path / f"groups{extension}"
    wrong = pair("wrong")
    wrong.completions[1].reward = float("nan")
    assert message(lambda: write([pair("a"), wrong], path)).startswith(
        f"{path}, group 2, field 'completions[1].reward': nan is non-finite"
    )
    assert message(lambda: write([pair("a"), pair("b", when={1, 2})], path)) == (
        f"{path}, group 2: not JSON: Object of type set is not JSON serializable; "
        "keep meta, columns and messages to what JSON can hold"
    )
    assert message(lambda: write(["text"], path)).startswith(f"{path}, group 1: expected a Group, got 'text' (str)")


@pytest.mark.parametrize(
    "use", [read_groups, lambda path: write_groups([], path), lambda path: append_groups([], path)]
)
@pytest.mark.parametrize("name", ["groups.json", "groups"])
def test_names_both_formats_for_another_extension(tmp_path: Path, use: Callable[..., object], name: str) -> None:
    path = tmp_path / name
    extension = "" if name == "groups" else ".json"
    expected = f"{path}: unknown extension {extension!r}; groups are kept in .jsonl or .parquet files"
    assert message(lambda: use(path)) == expected


@pytest.mark.parametrize("extension", FORMATS)
def test_a_wrong_path_is_told_at_the_call(tmp_path: Path, extension: str) -> None:
    missing = tmp_path / f"missing{extension}"
    assert message(lambda: read_groups(missing)) == (
        f"{missing}: no such file; check the path (the working directory is {Path.cwd()})"
    )
    (folder := tmp_path / f"folder{extension}").mkdir()
    assert message(lambda: read_groups(folder)) == f"{folder}: is a directory; name a .jsonl or .parquet file"


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_bytes(content)
    assert reading(path) == "groups.jsonl: no rows, the file is empty; write at least one group"


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "groups.parquet"
    assert write_groups([], path) == 0
    assert reading(path) == "groups.parquet: no rows, the file is empty; write at least one group"


def test_dataset_lines_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.replace("a", "c").encode())
    first, second = read_groups(path)
    assert (first.completions[0], first.completions[0].source) == (Completion("a", source="dataset"), "dataset")
    assert second.k == 2


def test_numbered_rows_are_the_rows_as_they_stand(tmp_path: Path) -> None:
    lines = save(tmp_path / "data.jsonl", '{"question": "q"}', "", "[1]")
    assert list(numbered_rows(lines)) == [(f"{lines}, line 1", {"question": "q"}), (f"{lines}, line 3", [1])]
    columns = table(tmp_path / "data.parquet", question=["q", None], answer=[1, 2])
    first, second = numbered_rows(columns)
    assert first == (f"{columns}, row 1", {"question": "q", "answer": 1})
    assert second == (f"{columns}, row 2", {"question": None, "answer": 2})


PAIR = '{"prompt": "p", "completions": ["a", "b"], "rewards": '
MEMBERS = '{"prompt": "p", "completions": [{"text": "a"}, {"text": "b", '
NOT_FINITE = "is non-finite; give a finite number or null (None)"
WRONG = [
    (PAIR + "[1]}", ", field 'rewards': 1 reward for 2 completions; give one number or null per completion"),
    (PAIR + '[0, "1"]}', ", field 'rewards[1]': expected a number, got '1' (str); give a finite number or null (None)"),
    (PAIR + "[NaN, 0]}", f", field 'rewards[0]': nan {NOT_FINITE}"),
    (MEMBERS + '"reward": -Infinity}]}', f", field 'completions[1].reward': -inf {NOT_FINITE}"),
    (MEMBERS + '"reward": 1e999}]}', f", field 'completions[1].reward': inf {NOT_FINITE}"),
    (MEMBERS + '"sorce": "x"}]}', ", field 'completions[1].sorce': unknown; the nearest valid name is 'source'"),
    (MEMBERS + '"meta": "{}"}]}', ", field 'completions[1].meta': expected an object with string keys, got '{}' (str)"),
    ('{"completions": ["a"]}', ", field 'prompt': missing; give a string, a list of chat messages, or 'prompt_ids'"),
    ('{"prompt": "p"}', ", field 'completions': missing; give a list of strings or of objects"),
    ('{"prompt": "p", "completions": {}}', ", field 'completions': expected a list of strings or of objects, got dict"),
    (
        '{"prompt": "p", "completions": []}',
        ", field 'completions': an empty list; give at least one entry, or drop the",
    ),
    ('["p"]', ": expected an object with 'prompt' and 'completions', got list"),
    ("null", ": expected an object with 'prompt' and 'completions', got None"),
    (
        '{"prompt": "p" "completions"}',
        ": not JSON (Expecting ',' delimiter at column 16); each line is one JSON object",
    ),
    ("[" * 100_000, ": not JSON (maximum recursion depth exceeded"),
    ("1" * 5000, ": not JSON (Exceeds the limit (4300 digits) for integer string conversion"),
    (b'{"prompt": "\xff"}', ": not UTF-8 (byte 0xff at position 13); save the file as UTF-8"),
    (b'{"prompt": "\xc3', ": not UTF-8 (byte 0xc3 at position 13); save the file as UTF-8"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG, ids=range(len(WRONG)))
def test_names_the_line_and_field_that_is_wrong(tmp_path: Path, line: str | bytes, expected: str) -> None:
    path = save(tmp_path / "data.jsonl", GOOD, "", line, GOOD)
    assert reading(path).startswith(f"data.jsonl, line 3{expected}")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ('{"prompt": "p", "compl', "not JSON (Unterminated string starting at at column 17), and the last line has no"),
        ("{", "not JSON (Expecting property name enclosed in double quotes at column 2), and the last line has no"),
        (b'{"prompt": "\xc3', "the last line breaks off within a character, so it looks truncated"),
    ],
)
def test_a_cut_last_line_looks_truncated(tmp_path: Path, tail: str | bytes, expected: str) -> None:
    text = reading(save(tmp_path / "data.jsonl", GOOD, tail, end=""))
    assert text.startswith(f"data.jsonl, line 2: {expected}")
    assert text.endswith("so it looks truncated, as by a crash while writing; delete that line")


def test_other_faults_of_the_last_line_are_told_as_they_are(tmp_path: Path) -> None:
    assert reading(save(tmp_path / "data.jsonl", b'{"prompt": "\xff"}', end="")) == (
        "data.jsonl, line 1: not UTF-8 (byte 0xff at position 13); save the file as UTF-8"
    )
    assert "truncated" not in reading(save(tmp_path / "data.jsonl", GOOD, '["p"]', end=""))
    assert "truncated" not in reading(save(tmp_path / "data.jsonl", GOOD, "broken"))


def test_a_file_that_vanishes_before_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "data.jsonl", GOOD)
    reader = read_groups(path)
    path.unlink()
    assert message(lambda: next(reader)) == (
        f"{path}: cannot be opened (No such file or directory); check the path and its permissions"
    )


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"prompt": "p"}\n' * 100])
def test_refuses_what_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    text = reading(path)
    assert text.startswith("data.parquet: not readable as Parquet (Parquet ")
    assert text.endswith("); write the file again")


def test_parquet_of_a_dataset(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    columns = {"prompt": [chat, chat], "completions": [["a", "b"], ["c"]], "rewards": [[1.0, None], None]}
    path = table(tmp_path / "data.parquet", **columns, answer=["x", None])
    a, b, c = (Completion(text, reward=r, source="dataset") for text, r in [("a", 1.0), ("b", None), ("c", None)])
    expected = [Group(chat, [a, b], columns={"answer": "x"}), Group(chat, [c], columns={"answer": None})]
    assert list(read_groups(path)) == expected


def test_parquet_of_json_lines_that_another_tool_converted(tmp_path: Path) -> None:
    members = [[{"text": "a", "reward": 1.0, "source": None}, {"text": "b", "reward": None, "source": "teacher"}]]
    path = table(tmp_path / "data.parquet", prompt=["p"], completions=members, columns=[{"answer": 3}])
    assert list(read_groups(path)) == [
        Group("p", [Completion("a", reward=1.0), Completion("b", source="teacher")], columns={"answer": 3})
    ]


def test_a_long_complaint_of_the_parquet_library_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise pa.ArrowInvalid("first\nsecond")

    path = table(tmp_path / "data.parquet", prompt=["p"])
    monkeypatch.setattr(pq, "ParquetFile", fail)
    assert reading(path) == "data.parquet: not readable as Parquet (first); write the file again"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"completions": [["a"]] * 2, "rewards": [[1.0], [float("nan")]]}, f"field 'rewards[0]': nan {NOT_FINITE}"),
        ({"completions": [["a"]] * 2, "prompt": ["p", None]}, "field 'prompt': missing; give a string, a list"),
        ({"completions": [["a"], []]}, "field 'completions': an empty list; give"),
        ({"completions": [["a"], None]}, "field 'completions': missing; give a list"),
        (
            {"completions": [[{"text": "a"}], [{"text": "b"}, None]]},
            "field 'completions[1]': expected the same kind as",
        ),
        (
            {"completions": [[{"text": "a"}]] * 2, "columns": ["{}", "{"]},
            "field 'columns': not JSON (Expecting property name enclosed in double quotes at column 2); it holds JSON",
        ),
        (
            {"completions": [[{"text": "a", "meta": "{}"}], [{"text": "a", "meta": "no"}]]},
            "field 'completions[0].meta': not JSON (Expecting value at column 1); it holds JSON as text",
        ),
    ],
)
def test_names_the_parquet_row_and_field_that_is_wrong(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    path = table(tmp_path / "data.parquet", **{"prompt": ["p", "p"]} | columns)
    assert reading(path).startswith(f"data.parquet, row 2, {expected}")
    assert next(read_groups(path)).completions[0].text == "a"
