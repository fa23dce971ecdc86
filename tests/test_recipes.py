"""The recipes' data preparation; what needs verl is tested beside the plug-in."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "verl"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", FOLDER / "prepare_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(prepare, monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, arguments)])
    return prepare.main()


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2 + 2 = 4\n#### 1,234", "1234"),
        (r"so \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"which is $\boxed 9$ of them", "9"),
    ],
)
def test_the_final_answer_of_a_solution(prepare, solution, answer):
    assert prepare.final_answer(solution) == answer


@pytest.mark.parametrize("solution", ["none", r"\boxed{never closed", ""])
def test_a_solution_without_an_answer_is_an_error(prepare, solution):
    with pytest.raises(ValueError, match="neither ####"):
        prepare.final_answer(solution)


def test_rows_of_a_file_become_verls(prepare, monkeypatch, tmp_path):
    rows = [{"question": "How many?\u2028Really", "answer": "4"}, {"problem": "Which?", "answers": ["a", "b"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert run(prepare, monkeypatch, "--math", tmp_path, "--test", tmp_path / "rows.jsonl") == 0
    made = pq.read_table(tmp_path / "math" / "test.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in made] == ["4", "a"]
    assert made[0]["prompt"][0]["content"].startswith("How many?\u2028Really Let's think")
    assert not (tmp_path / "math" / "train.parquet").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"answer": "1"}', "line 2: has no problem"),
        ('{"problem": "p"}', "line 2: has no answer"),
    ],
)
def test_a_row_that_is_not_one_is_named(prepare, monkeypatch, capsys, tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"problem": "p", "answer": "1"}\n' + line)
    assert run(prepare, monkeypatch, "--math", tmp_path, "--test", tmp_path / "rows.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "math").exists()


def test_gsm8ks_own_rows_have_their_answer_in_the_solution(prepare, monkeypatch, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "9 * 2 = 18\n#### 1,018"}))
    assert run(prepare, monkeypatch, "--gsm8k", tmp_path, "--test", tmp_path / "rows.jsonl") == 0
    (row,) = pq.read_table(tmp_path / "gsm8k" / "test.parquet").to_pylist()
    assert row["reward_model"]["ground_truth"] == "1018"


def test_nothing_is_written_where_a_file_is_missing(prepare, monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "1"}))
    files = ("--train", tmp_path / "rows.jsonl", "--test", tmp_path / "none.jsonl")
    assert run(prepare, monkeypatch, "--gsm8k", tmp_path / "out", *files) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("qwen*.sh")), ids=lambda path: path.stem)
def test_the_estimates_are_the_cost_models(recipe):
    """Every figure of a recipe's estimate is in docs/scale.md, in the row of its model, data and GPUs."""
    text = recipe.read_text(encoding="utf-8")
    tables = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    size = re.search(r"Qwen2.5-Math-([\d.]+B)", text)
    assert size is not None
    data = "GSM8K + MATH" if "gsm8k" in recipe.stem else "MATH"
    found = 0
    for count, gpu in re.findall(r"#   (\d) x (H100|A100) 80 GB", text):
        row = next(line for line in tables.splitlines() if line.startswith(f"| {size[1]}, {data}: {count} {gpu}"))
        cells = [cell.strip() for cell in row.split("|")]
        part = text.split(f"{count} x {gpu} 80 GB", 1)[1].split("#   2 x A100" if gpu == "H100" else "--dry-run")[0]
        assert f"{cells[-3]} s a step" in part
        assert f"{cells[-2]} h" in part
        found += 1
    assert found == 2
