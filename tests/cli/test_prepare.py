"""`gvpo prepare`: which rows are written, what is said of the overlap, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gvpo.cli import main as main_module
from gvpo.cli.main import main
from gvpo.sources.dataset import read_rows

COPIED = "What is the sum of the first one hundred positive whole numbers, please tell me"
TESTS = [
    f"{COPIED} now?",
    "Solve 3x = 6.",
    "A test problem that shares nothing with any of the training problems at all.",
]
TRAINING = ["How many eggs are in two dozen?", f"Quick! {COPIED}.", "solve 3X = 6", "And how many in three dozen?"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(main_module.COMMANDS, "prepare", "Prompts.")
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", TRAINING)
    write("test.jsonl", TESTS)
    return tmp_path


def write(path: str, problems: Sequence[str]) -> None:
    rows = [{"problem": problem, "answers": [str(i)], "level": i} for i, problem in enumerate(problems)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(*arguments: str) -> int:
    return main(["prepare", *arguments]) or 0


def written(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows(capsys: pytest.CaptureFixture[str]):
    assert prepare("--task", "train.jsonl", "--out", "out.jsonl", "--template", "question", "--limit", "2") == 0
    assert written("out.jsonl") == [
        {
            "prompt": f"Question: {problem}\nAnswer:",
            "answers": [str(i)],
            "problem": problem,
            "id": f"train/{i}",
            "answer": str(i),
            "level": i,
        }
        for i, problem in enumerate(TRAINING[:2])
    ]
    assert capsys.readouterr().out == "out.jsonl: 2 rows of train.jsonl, template question\n"
    assert [row.columns["answers"] for row in read_rows("out.jsonl")] == [["0"], ["1"]]


def test_several_tasks_and_a_data_dir(tmp_path: Path):
    (tmp_path / "data").mkdir()
    write("data/aime24.jsonl", ["How?"] * 30)
    assert prepare("--task", "aime24", "--task", "train.jsonl", "--data-dir", "data", "--out", "out.jsonl") == 0
    assert [row["id"] for row in written("out.jsonl")] == [
        *(f"aime24/{i}" for i in range(30)),
        *(f"train/{i}" for i in range(4)),
    ]


def test_a_prepared_file_can_be_prepared_again():
    prepare("--task", "train.jsonl", "--out", "first.jsonl", "--template", "r1")
    prepare("--task", "first.jsonl", "--out", "second.jsonl", "--template", "plain")
    assert [row["prompt"] for row in written("second.jsonl")] == TRAINING


def test_overlap_is_told(capsys: pytest.CaptureFixture[str]):
    assert prepare("--task", "train.jsonl", "--check_against", "test.jsonl", "--report", "found.json") == 0
    out = capsys.readouterr().out
    # The copy has 15 words before "now?": it lacks the last of the test problem's four 13-grams.
    assert " ".join(out.splitlines()[3].split()) == "test 3 2 2 1 test/1, 100%: train.jsonl, line 3"
    assert "\n2 of 4 problems share 13 words in a row with a test problem, or are one\n" in out
    assert "\n1 test problems have fewer words" in out
    found = json.loads(Path("found.json").read_text())
    assert [(one["id"], one["share"], one["nearest_text"]) for one in found["found"]] == [
        ("test/1", 1.0, TRAINING[2]),
        ("test/0", 0.75, TRAINING[1]),
    ]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], [0, 1, 2, 3]),
        (["--drop_overlap"], [0, 3]),
        (["--drop_overlap", "--min_share", "0.75"], [0, 3]),
        (["--drop_overlap", "--min_share", "0.76"], [0, 1, 3]),
        (["--drop_overlap", "--ngram", "17"], [0, 1, 3]),  # as a whole alone
    ],
)
def test_overlap_is_dropped(options: list[str], kept: list[int], capsys: pytest.CaptureFixture[str]):
    assert prepare("--task", "train.jsonl", "--check_against", "test.jsonl", "--out", "out.jsonl", *options) == 0
    assert [row["problem"] for row in written("out.jsonl")] == [TRAINING[i] for i in kept]
    dropped = f", {4 - len(kept)} left out" if options else ""
    assert capsys.readouterr().out.endswith(f"out.jsonl: {len(kept)} rows of train.jsonl, template chat{dropped}\n")


def test_a_suite_is_all_its_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from gvpo.tasks import SUITES

    monkeypatch.setitem(SUITES, "mine", ("test.jsonl", "train.jsonl"))
    assert prepare("--task", "train.jsonl", "--check_against", "mine", "--check_against", "train.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[3:5]] == [["test", "3"], ["train", "4"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: give --out FILE.jsonl, or --check_against a suite, or both"),
        (["--out", "out.json"], "--out out.json: rows are written as JSON lines; name a .jsonl file"),
        (["--out", "no/out.jsonl"], "--out no/out.jsonl: the folder no does not exist; make it first"),
        (["--out", "./train.jsonl"], "--out ./train.jsonl: the problems are read from this file; name another"),
        (["--out", "test.jsonl", "--check_against", "test.jsonl"], "--out test.jsonl: the problems are read from this"),
        (["--out", "dir.jsonl"], "--out dir.jsonl: is a folder; name a file in it"),
        (["--out", "out.jsonl", "--template", "qwen"], "template 'qwen': no such template"),
        (["--out", "out.jsonl", "--drop_overlap"], "--drop_overlap leaves rows out of --out: give --out, and"),
        (
            ["--out", "out.jsonl", "--check_against", "test.jsonl", "--min_share", "0.5"],
            "--min_share says what --drop_overlap leaves out: give that too",
        ),
        (["--out", "out.jsonl", "--report", "r.json"], "--report writes what is shared: give --check_against too"),
        (
            ["--report", "r.txt", "--check_against", "test.jsonl"],
            "--report r.txt: is written as JSON; name a .json file",
        ),
        (["--out", "out.jsonl", "--check_against", "no.jsonl"], "no.jsonl: no such file"),
        (
            ["--out", "out.jsonl", "--check_against", "copy.jsonl", "--drop_overlap"],
            "--drop_overlap leaves no row: every problem shares words with a test problem",
        ),
        (["--out", "out.jsonl", "--task", "bad.jsonl"], "bad.jsonl, line 1, field 'answers': an empty list; give"),
    ],
)
def test_refused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "dir.jsonl").mkdir()
    write("copy.jsonl", TRAINING)
    Path("bad.jsonl").write_text('{"problem": "p", "answers": []}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert prepare("--task", "train.jsonl", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gvpo prepare: {message}") and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_what_is_no_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"problem": "p", "answers": ["1"], "day": datetime.date(2024, 1, 1)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "days.parquet")
    Path("out.jsonl").write_text("old\n")
    assert prepare("--task", "days.parquet", "--out", "out.jsonl") == 2
    assert capsys.readouterr().err.startswith("gvpo prepare: days.parquet, row 1: cannot be written as JSON (")
    assert Path("out.jsonl").read_text() == "old\n"
    assert not list(tmp_path.glob(".*"))


def test_a_task_is_given_once(capsys: pytest.CaptureFixture[str]):
    assert prepare("--task", "train.jsonl", "--task", "train.jsonl", "--out", "out.jsonl") == 2
    assert capsys.readouterr().err.endswith("another task is called 'train' too; give each once, or rename a file\n")
