"""Groups from files: in order, each as often as it may, none lost, none twice; what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gvpo.errors import UserError
from gvpo.group_files import append_groups, write_groups
from gvpo.groups import Completion, Group
from gvpo.sources.files import GroupFiles
from gvpo.sources.specs import FilesSpec


def group(name: str, *, prompt: int = 1, update: int | None = None) -> Group:
    meta = {} if update is None else {"update": update}
    members = [Completion(None, [n + 2], reward=float(n), meta=dict(meta)) for n in range(2)]
    return Group(None, members, prompt_ids=[prompt], id=name)


def drop(folder: Path, name: str, ids: str, **settings: int) -> None:
    write_groups([group(one, **settings) for one in ids], folder / name)


def files(path: Path, **settings: object) -> GroupFiles:
    made = GroupFiles(FilesSpec(path=str(path), **settings))  # pyright: ignore[reportArgumentType]
    made.look()
    return made


def taken(source: GroupFiles, count: int, update: int = 0) -> str:
    return "".join(row.id or "?" for row in source.take(count, update=update))


def test_groups_come_in_the_order_of_names_and_places_each_once(tmp_path: Path) -> None:
    drop(tmp_path, "b-2.jsonl", "de")
    drop(tmp_path, "a-1.jsonl", "abc")
    drop(tmp_path, "c.parquet", "f")
    source = files(tmp_path)
    assert source.held == 6
    assert [taken(source, count) for count in (2, 2, 9, 9)] == ["ab", "cd", "ef", ""]


def test_one_file_alone(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "abc")
    assert taken(files(tmp_path / "a.jsonl"), 9) == "abc"


def test_every_group_is_used_as_often_as_stated_passes_one_after_another(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "abc")
    drop(tmp_path, "b.jsonl", "d")
    source = files(tmp_path, uses=2)
    assert [taken(source, count) for count in (3, 3, 9)] == ["abc", "dab", "cd"]


def test_new_files_come_after_those_that_were_seen_and_before_a_second_use(tmp_path: Path) -> None:
    drop(tmp_path, "m.jsonl", "ab")
    source = files(tmp_path, follow=True, uses=2)
    assert taken(source, 1) == "a"
    drop(tmp_path, "a.jsonl", "cd")
    source.look()
    assert taken(source, 4) == "bcda"
    drop(tmp_path, "z.jsonl", "e")
    source.look()
    assert taken(source, 9) == "ebcde"


def test_unfinished_files_are_passed_over(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "a")
    (tmp_path / ".b.jsonl.12ab.tmp").write_text('{"half')
    (tmp_path / ".b.jsonl").write_text('{"half')
    (tmp_path / "notes.txt").write_text("not a group")
    assert taken(files(tmp_path), 9) == "a"


def test_a_run_goes_on_with_the_group_after_the_last(tmp_path: Path) -> None:
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir(), kept.mkdir()
    drop(data, "m.jsonl", "abc")
    source = files(data, follow=True, uses=2)
    assert taken(source, 2) == "ab"
    source.save(kept)
    drop(data, "a.jsonl", "de")
    source.look()
    rest = taken(source, 9)

    other = files(data, follow=True, uses=2)
    assert taken(other, 4) == "deab"  # by name, as it was not there when the others were found
    other.load(kept)
    other.look()
    assert taken(other, 9) == rest == "cdeabcde"


def test_a_used_file_may_be_removed_before_a_run_goes_on(tmp_path: Path) -> None:
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir(), kept.mkdir()
    drop(data, "a.jsonl", "ab")
    drop(data, "b.jsonl", "cd")
    source = files(data)
    assert taken(source, 3) == "abc"
    source.save(kept)
    (data / "a.jsonl").unlink()
    other = files(data)
    other.load(kept)
    other.look()
    assert taken(other, 9) == "d"


def test_groups_that_are_appended_are_taken_after_the_files_others(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "ab")
    source = files(tmp_path, follow=True)
    assert taken(source, 9) == "ab"
    append_groups([group("c"), group("d")], tmp_path / "a.jsonl")
    source.look()
    assert taken(source, 1) == "c"
    append_groups([group("e")], tmp_path / "a.jsonl")
    source.look()
    assert source.held == 5 and taken(source, 9) == "de"


@pytest.mark.parametrize("follow", [False, True])
def test_a_run_that_goes_on_takes_what_was_appended_meanwhile(tmp_path: Path, follow: bool) -> None:
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir(), kept.mkdir()
    drop(data, "a.jsonl", "ab")
    source = files(data, follow=follow)
    assert taken(source, 2) == "ab"
    source.save(kept)
    append_groups([group("c")], data / "a.jsonl")
    other = files(data, follow=follow)
    other.load(kept)
    assert taken(other, 9) == "c"


def test_a_file_that_grows_when_its_groups_come_again_is_refused(tmp_path: Path) -> None:
    """How often each was used is one count a file: the new ones would be taken for used, or the old ones come again."""
    drop(tmp_path, "a.jsonl", "ab")
    source = files(tmp_path, follow=True, uses=2)
    assert taken(source, 3) == "aba"
    append_groups([group("c")], tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="has grown from 2 groups to 3 after some were used again"):
        source.look()


def test_a_file_cannot_be_followed(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "a")
    with pytest.raises(UserError, match="is a file, and only a folder can be followed"):
        files(tmp_path / "a.jsonl", follow=True)


def test_stale_groups_are_left_out_and_counted(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "a", update=3)
    drop(tmp_path, "b.jsonl", "b", update=7)
    drop(tmp_path, "c.jsonl", "c")  # drawn by nobody knows which policy
    source = files(tmp_path, max_staleness=5)
    assert taken(source, 9, update=9) == "bc" and source.stale == 1


def test_an_id_is_for_one_draw(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "ab")
    drop(tmp_path, "b.jsonl", "cb")
    with pytest.raises(UserError, match=r"b\.jsonl, line 2, field 'id': 'b' is the id of another group too \(.*a"):
        files(tmp_path)
    drop(tmp_path, "b.jsonl", "b", prompt=5)
    with pytest.raises(UserError, match="'b' is the id of another group too, with another prompt"):
        files(tmp_path)


def test_a_truncated_last_line_is_one_line(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "ab")
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: .*looks truncated.*delete that line"):
        files(tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == whole[:-20]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', "field 'completions': missing; files hold groups"),
        ('{"prompt": "x", "completions": ["a"]}', "1 completion; a group needs two"),
        ('{"prompt": "x", "completions": [{"text": "a", "reward": NaN}, {"text": "b"}]}', "non-finite"),
    ],
)
def test_a_row_that_is_no_group_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    write_groups([group("a")], file)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=message) as raised:
        files(tmp_path)
    assert "a.jsonl, line 2" in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder to follow"):
        files(tmp_path / "none", follow=True)
    with pytest.raises(UserError, match="none: no such file or folder"):
        files(tmp_path / "none")


def test_the_state_is_json(tmp_path: Path) -> None:
    drop(tmp_path, "a.jsonl", "ab")
    source = files(tmp_path)
    source.take(1, update=0)
    assert json.loads(json.dumps(source.state_dict())) == {"stale": 0, "files": {"a.jsonl": [2, 1]}}
