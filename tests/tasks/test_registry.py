"""Problems of a task: from files, from the hub (a stand-in with each dataset's own columns), and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo.errors import UserError
from gvpo.tasks import SUITES, TASKS, load_problems, task_labels
from gvpo.tasks import registry as registry_module


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[dict[str, Any]]]:
    """What stands on the hub: rows by repository, configuration and split."""
    datasets: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {}

    def load_dataset(path: str, name: str | None = None, *, split: str) -> list[dict[str, Any]]:
        if (path, name, split) not in datasets:
            raise ValueError(f"no {path}\nand more lines")
        return datasets[path, name, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(registry_module, "check_hub", lambda kind, name, advice: None)
    return datasets


# The columns of each dataset as they are on the hub, and what a problem of it is.
HUB = {
    "gsm8k": (
        ("openai/gsm8k", "main", "test"),
        {"question": "How many eggs?", "answer": "16 * 70 = <<16*70=1120>>1,120\n#### 1,120"},
        ("How many eggs?", ["1120"], {"solution": "16 * 70 = <<16*70=1120>>1,120\n#### 1,120"}),
    ),
    "gsm8k-train": (
        ("openai/gsm8k", "main", "train"),
        {"question": "How many clips?", "answer": "48/2 = 24\n#### 24"},
        ("How many clips?", ["24"], {"solution": "48/2 = 24\n#### 24"}),
    ),
    "math": (
        ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
        {"problem": "Find $a$.", "level": "Level 5", "type": "Algebra", "solution": "so $\\boxed{0}$."},
        ("Find $a$.", ["0"], {"level": "Level 5", "type": "Algebra", "solution": "so $\\boxed{0}$."}),
    ),
    "math-test": (
        ("DigitalLearningGmbH/MATH-lighteval", "default", "test"),
        {"problem": "Find $b$.", "level": "Level 1", "type": "Geometry", "solution": "$\\boxed 2$"},
        ("Find $b$.", ["2"], {"level": "Level 1", "type": "Geometry", "solution": "$\\boxed 2$"}),
    ),
    "math500": (
        ("HuggingFaceH4/MATH-500", None, "test"),
        {
            "problem": "Find $c$.",
            "solution": "$\\boxed{\\frac12}$",
            "answer": "\\frac12",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        (
            "Find $c$.",
            ["\\frac12"],
            {"solution": "$\\boxed{\\frac12}$", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
        ),
    ),
    "aime24": (
        ("HuggingFaceH4/aime_2024", None, "train"),
        {"id": 60, "problem": "Find $t$.", "solution": "$\\boxed{025}$", "answer": "025", "url": "u", "year": "2024"},
        ("Find $t$.", ["025"], {"id": 60, "solution": "$\\boxed{025}$", "url": "u", "year": "2024"}),
    ),
    "amc": (
        ("AI-MO/aimo-validation-amc", None, "train"),
        {"id": 0, "problem": "Find $m+n$.", "answer": 142.0, "url": "u"},
        ("Find $m+n$.", ["142"], {"id": 0, "url": "u"}),
    ),
    "minerva": (
        ("math-ai/minervamath", None, "test"),
        {"question": "Estimate the wavelength.", "answer": "9.6"},
        ("Estimate the wavelength.", ["9.6"], {}),
    ),
    "olympiadbench": (
        ("knoveleng/OlympiadBench", None, "train"),
        {
            "id": 1606,
            "subfield": "Combinatorics",
            "context": None,
            "question": "How many moves?",
            "solution": ["2 moves are enough."],
            "final_answer": ["2"],
            "is_multiple_answer": False,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
            "answer": "2",
        },
        (
            "How many moves?",
            ["2"],
            {
                "id": 1606,
                "subfield": "Combinatorics",
                "context": None,
                "solution": ["2 moves are enough."],
                "final_answer": ["2"],
                "is_multiple_answer": False,
                "unit": None,
                "answer_type": "Numerical",
                "error": None,
            },
        ),
    ),
}


class TestHub:
    def test_every_task_is_covered_here(self):
        assert set(HUB) == set(TASKS)
        assert all(set(tasks) <= set(TASKS) for tasks in SUITES.values())

    @pytest.mark.parametrize("name", HUB)
    def test_rows_of_the_dataset(self, name: str, hub: dict[Any, Any]):
        place, row, (text, answers, columns) = HUB[name]
        hub[place] = [row] * TASKS[name].size
        problems = load_problems(name)
        assert len(problems) == TASKS[name].size
        last = problems[-1]
        assert (last.text, last.answers, last.columns) == (text, answers, columns)
        assert last.id == f"{name}/{TASKS[name].size - 1}"
        assert last.where == f"{place[0]}:{place[2]}, row {TASKS[name].size}"

    def test_a_bad_row_is_named(self, hub: dict[Any, Any]):
        hub[HUB["minerva"][0]] = [{"question": "p", "answer": "1"}, {"question": "p", "answer": ""}]
        with pytest.raises(UserError, match=r"^math-ai/minervamath:test, row 2, field 'answer': empty; give"):
            load_problems("minerva")

    def test_another_column_is_not_guessed(self, hub: dict[Any, Any]):
        hub[HUB["minerva"][0]] = [{"problem": "p", "answer": "1"}]
        with pytest.raises(UserError, match=r"row 1, field 'question': missing \(the row has problem, answer\)"):
            load_problems("minerva")

    def test_another_size_is_another_set(self, hub: dict[Any, Any]):
        hub[HUB["amc"][0]] = [HUB["amc"][1]] * 40
        with pytest.raises(
            UserError, match=r"^AI-MO/aimo-validation-amc: 40 problems, and amc has 83, so this is another"
        ):
            load_problems("amc")
        with pytest.raises(UserError, match="40 problems"):
            load_problems("amc", limit=4)

    def test_what_cannot_be_loaded(self, hub: dict[Any, Any]):
        with pytest.raises(UserError) as error:
            load_problems("amc")
        assert str(error.value) == (
            "task 'amc': AI-MO/aimo-validation-amc could not be loaded from the hub (no AI-MO/aimo-validation-amc); "
            "put the problems in FOLDER/amc.jsonl and give FOLDER as data_dir"
        )

    def test_no_hub(self, monkeypatch: pytest.MonkeyPatch):
        def check_hub(kind: str, name: str, advice: str) -> None:
            raise UserError(f"{kind} {name!r}: not reached; {advice}")

        monkeypatch.setattr(registry_module, "check_hub", check_hub)
        with pytest.raises(
            UserError, match=r"^dataset 'openai/gsm8k': not reached; put the problems in FOLDER/gsm8k.jsonl"
        ):
            load_problems("gsm8k")


ROW = {"problem": "2+2?", "answers": ["4", "four"]}


class TestFiles:
    def test_jsonl(self, tmp_path: Path):
        path = write(tmp_path / "mine.jsonl", [ROW, "", {"question": "3+3?", "answer": 6, "level": 1}])
        first, second = load_problems(str(path))
        assert (first.text, first.answers, first.id, first.where) == (
            "2+2?",
            ["4", "four"],
            "mine/0",
            f"{path}, line 1",
        )
        assert (second.answers, second.id, second.where) == (["6"], "mine/1", f"{path}, line 3")
        assert second.columns == {"level": 1}

    def test_parquet(self, tmp_path: Path):
        pq.write_table(pa.Table.from_pylist([ROW, {"problem": "3+3?", "answers": ["6"]}]), tmp_path / "mine.parquet")
        problems = load_problems(str(tmp_path / "mine.parquet"))
        assert [problem.answers for problem in problems] == [["4", "four"], ["6"]]
        assert problems[1].where == f"{tmp_path / 'mine.parquet'}, row 2"

    def test_limit(self, tmp_path: Path):
        path = write(tmp_path / "mine.jsonl", [ROW, ROW, "not read"])
        assert len(load_problems(str(path), limit=2)) == 2
        with pytest.raises(UserError, match=r"^limit 0: give 1 or more"):
            load_problems(str(path), limit=0)

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_data_dir(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"aime24{suffix}"
        if suffix == ".jsonl":
            write(path, [ROW] * 30)
        else:
            pq.write_table(pa.Table.from_pylist([ROW] * 30), path)
        problems = load_problems("aime24", data_dir=tmp_path)
        assert [problem.id for problem in problems] == [f"aime24/{i}" for i in range(30)]
        assert problems[0].where.startswith(str(path))
        assert [len(load_problems("aime24", data_dir=str(tmp_path), limit=n)) for n in (4, 99)] == [4, 30]

    def test_data_dir_without_the_file(self, tmp_path: Path):
        with pytest.raises(UserError) as error:
            load_problems("amc", data_dir=tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'amc.jsonl'}: no such file")

    def test_data_dir_with_another_set(self, tmp_path: Path):
        path = write(tmp_path / "aime24.jsonl", [ROW] * 31)
        with pytest.raises(UserError, match=r"31 problems, and aime24 has 30, .* give the right one, or a file as the"):
            load_problems("aime24", data_dir=tmp_path)
        assert len(load_problems(str(path))) == 31  # a set of one's own has any size

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], "{path}: no rows; give at least one problem"),
            (["", " "], "{path}: no rows"),
            ([ROW, '{"problem": '], "{path}, line 2: not JSON"),
            ([ROW, [1]], "{path}, line 2: expected an object"),
            ([ROW, {"problem": "p", "answers": []}], "{path}, line 2, field 'answers': an empty list; give"),
            (
                [ROW, {"problem": "p", "answers": "NaN"}, '{"problem": "p", "answer": NaN}'],
                "{path}, line 3, field 'answer'",
            ),
        ],
    )
    def test_refused(self, tmp_path: Path, lines: list[Any], message: str):
        path = write(tmp_path / "mine.jsonl", lines)
        with pytest.raises(UserError) as error:
            load_problems(str(path))
        assert str(error.value).startswith(message.format(path=path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "olympiad-bench",
            "task 'olympiad-bench': neither a known task, nor a .jsonl or .parquet file, nor gym:NAME; did",
        ),
        ("amc.csv", "task 'amc.csv': neither a known task"),
        ("no.jsonl", "no.jsonl: no such file"),
    ],
)
def test_unknown(name: str, message: str):
    with pytest.raises(UserError) as error:
        load_problems(name)
    assert str(error.value).startswith(message)


def test_names_in_a_run() -> None:
    names = ["amc", "some/b.jsonl", "c.parquet", "gym:maze:50:1", "owner/d"]
    assert task_labels(names) == ["amc", "b", "c", "gym-maze-50-1", "owner-d"]
    with pytest.raises(UserError, match=r"^--task other/b\.parquet: another task is called 'b' too; give each"):
        task_labels(["some/b.jsonl", "other/b.parquet"])
