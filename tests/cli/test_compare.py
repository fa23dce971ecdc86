"""`gvpo compare`: two runs, problem by problem."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gvpo.cli.main import main
from gvpo.evaluation.paired import mcnemar, sign_flip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a task of twelve problems."""
    monkeypatch.chdir(tmp_path)
    write_task("task.jsonl", 12)
    return tmp_path


def write_task(path: str, count: int, **changes: Any) -> None:
    rows = [{"problem": f"p{n}", "answer": "r", **(changes if n == count - 1 else {})} for n in range(count)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(out: str, rows: Sequence[str], *tasks: str) -> None:
    """An evaluation; rows: for each problem a letter per completion, r = right."""
    Path("given.jsonl").write_text("".join(json.dumps({"completions": list(row)}) + "\n" for row in rows))
    names = [part for task in tasks or ("task.jsonl",) for part in ("--task", task)]
    assert main(["eval", "--completions", "given.jsonl", "--reward", "exact_match", *names, "--out", out]) in (None, 0)


def compare(*arguments: str) -> dict[str, Any]:
    assert main(["compare", *arguments, "--out", "comparison.json"]) in (None, 0)
    return json.loads(Path("comparison.json").read_text())


def test_one_completion_a_problem() -> None:
    run("a", "rrrrrrrrwwww")
    run("b", "rwwwwwwwrwww")
    found = compare("a", "b")
    task = found["tasks"]["task"]
    assert (task["won"], task["lost"]) == (7, 1)
    assert (task["a"], task["b"], task["difference"]) == (8 / 12, 2 / 12, 6 / 12)
    assert task["p"] == mcnemar(7, 1)
    # Of eight discordant problems all would have had to fall to one side: 2 / 2^8 < 0.05, 2 * (1 + 8) / 2^8 is not.
    assert (task["least_right"], task["least"]) == (8, 8 / 12)
    low, high = task["interval"]["low"], task["interval"]["high"]
    assert low < 0.5 < high
    assert low * 12 == pytest.approx(round(low * 12)) and high * 12 == pytest.approx(round(high * 12))


def test_several_completions_a_problem() -> None:
    a, b = [4, 4, 3, 2, 2, 1, 0, 0, 4, 4, 4, 4], [0, 1, 1, 1, 2, 2, 0, 0, 4, 2, 1, 0]
    for name, counts in (("a", a), ("b", b)):
        run(name, ["r" * n + "w" * (4 - n) for n in counts])
    task = compare("a", "b")["tasks"]["task"]
    differences = [one - other for one, other in zip(a, b, strict=True)]
    assert task["difference"] == sum(differences) / 48
    assert task["p"] == sign_flip(differences)
    assert (task["won"], task["lost"]) == (7, 1)


def test_exchanged_runs_differ_in_sign_alone() -> None:
    run("a", "rrrrrrrrwwww")
    run("b", "rwwwwwwwrwww")
    one, other = compare("a", "b")["tasks"]["task"], compare("b", "a")["tasks"]["task"]
    assert one["p"] == other["p"] and one["difference"] == -other["difference"]
    assert (one["won"], one["lost"], one["least"]) == (other["lost"], other["won"], other["least"])


def test_equal_runs_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "rrrrrrwwwwww")
    capsys.readouterr()
    task = compare("a", "a")["tasks"]["task"]
    assert (task["p"], task["difference"], task["interval"], task["least"]) == (1.0, 0.0, None, None)
    assert "+0.00" in capsys.readouterr().out


def test_tasks_and_their_average() -> None:
    write_task("more.jsonl", 4)
    run("a", "rrrrrrrrwwww" + "rrww", "task.jsonl", "more.jsonl")
    run("b", "rwwwwwwwrwww" + "rwww", "task.jsonl", "more.jsonl")
    found = compare("a", "b")
    assert list(found["tasks"]) == ["task", "more"]
    assert found["average"]["difference"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["average"]["interval"]["low"] < 0.375 < found["average"]["interval"]["high"]


def test_what_else_differs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "r" * 12)
    run("b", "w" * 12)
    found = compare("a", "b")
    assert list(found["differing_settings"]) == ["completions_digest"]
    assert "\ncompletions_digest: A " in capsys.readouterr().out


class TestRefused:
    def refuses(self, line: str, capsys: pytest.CaptureFixture[str], a: str = "a", b: str = "b") -> None:
        capsys.readouterr()
        assert main(["compare", a, b]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo compare: {line}")

    @pytest.mark.parametrize(("what", "value"), [("problem", "other"), ("answer", "w")])
    def test_other_problems(self, what: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
        run("a", "r" * 12)
        write_task("task.jsonl", 12, **{what: value})
        run("b", "r" * 12)
        name = {"problem": "problem", "answer": "answers"}[what]
        self.refuses(f"task, problem 11 (from 0): a and b differ in {name!r} (", capsys)

    def test_another_number_of_problems(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("a", "r" * 12)
        write_task("task.jsonl", 9)
        run("b", "r" * 9)
        self.refuses("task: b has 9 problems and a 12, the first more is task/9; evaluate both on the same", capsys)

    def test_other_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_task("more.jsonl", 4)
        run("a", "r" * 12)
        run("b", "r" * 16, "task.jsonl", "more.jsonl")
        self.refuses("a: has no task more, which b has; compare runs on the same", capsys)
        self.refuses("a: has no task more, which b has; compare runs on the same", capsys, "b", "a")

    def test_another_number_of_completions(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("a", ["r"] * 12)
        run("b", ["rw"] * 12)
        self.refuses("task: 1 completions a problem in a and 2 in b; evaluate both with the same -k", capsys)

    def test_an_unfinished_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("a", "r" * 12)
        run("b", "r" * 12)
        path = Path("b/task.jsonl")
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
        self.refuses("b: task has 5 of 12 problems; the gvpo eval command that began it goes on", capsys)
        path.write_bytes(b"")
        self.refuses("b: task has 0 of 12 problems", capsys)

    @pytest.mark.parametrize("settings", [None, "{", "[]", "{}", '{"tasks": {"task": 1}}'])
    def test_what_is_no_run(self, settings: str | None, capsys: pytest.CaptureFixture[str]) -> None:
        run("a", "r" * 12)
        Path("b").mkdir()
        if settings is not None:
            Path("b/settings.json").write_text(settings)
        self.refuses("b", capsys)
