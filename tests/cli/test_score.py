"""`gvpo score`: which groups get which rewards, and that a file is whole before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gvpo.cli import score as score_module
from gvpo.cli.main import main
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Completion, Group
from gvpo.rewards.fill import function_rewards

REWARDS = """
import math
from pathlib import Path
from gvpo import Completion, Group, append_groups

def length(completions, **columns):
    with Path(__file__).with_name("__pycache__").joinpath("calls").open("a") as calls:
        print(len(completions), file=calls)
    return [float(len(text)) for text in completions]

def target(completions, target, **columns):
    return [None if want is None else float(want) for want in target]

def tens(completions, log_extra, **columns):
    log_extra("ten", [10] * len(completions))
    return [10.0] * len(completions)

def nan_at_four(completions, **columns):
    return [math.nan if len(text) == 4 else 1.0 for text in completions]

def raising(completions, **columns):
    raise RuntimeError("no judge")

def appending(completions, **columns):
    append_groups([Group("p", [Completion("late")])] * 2, "groups.jsonl")
    return length(completions)

def needy(completions, solution, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with reward functions in it."""
    (tmp_path / "judge.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "__pycache__").mkdir()
    return tmp_path


def score(*arguments: str) -> int:
    return main(["score", *arguments]) or 0


def group(*texts: str, rewards: Sequence[float | None] | None = None, **columns: Any) -> Group:
    members = [
        Completion(text, reward=reward) for text, reward in zip(texts, rewards or [None] * len(texts), strict=True)
    ]
    return Group("p", members, columns=columns)


def calls() -> list[int]:
    """How many completions each call of judge:length got, whatever process it was in."""
    file = Path("__pycache__/calls")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def rewards_of(path: str) -> list[list[float | None]]:
    return [group.rewards for group in read_groups(path)]


@pytest.mark.parametrize("path", ["groups.jsonl", "groups.parquet"])
class TestRewards:
    def test_groups_without_rewards_get_them(self, path: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_groups([group("a", "abc"), group("a", "b", rewards=[5, None]), group("ab", "abcd", "")], path)
        assert score("--reward", "judge:length", path) == 0
        assert rewards_of(path) == [[1, 3], [5, None], [2, 4, 0]]
        first, given, _ = read_groups(path)
        assert [function_rewards(one) for one in first.completions] == [{"length": 1}, {"length": 3}]
        assert [function_rewards(one) for one in given.completions] == [{}, {}]
        # The mean is of the ten characters that five members have.
        assert capsys.readouterr().out == f"{path}: 2 groups scored, 1 had rewards; mean reward 2\n"

    def test_again_scores_all_anew(self, path: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_groups([group("a", "b", rewards=[7, None]), group("ab", "a")], path)
        assert score("--reward", "judge:tens", path, "--again") == 0
        assert score("--reward", "judge:length", path, "--again") == 0
        assert rewards_of(path) == [[1, 1], [2, 1]]
        assert [one.meta for one in next(read_groups(path)).completions] == [{"rewards": {"length": 1.0}}] * 2
        assert "2 groups scored, 0 had rewards; mean reward 1.25" in capsys.readouterr().out

    def test_several_functions_are_weighed_and_summed(self, path: str) -> None:
        write_groups([group("a", "abc")], path)
        both = ["--reward", "judge:length", "--reward", "judge:tens"]
        assert score(*both, path) == 0
        assert rewards_of(path) == [[11, 13]]
        assert score(*both, "--reward-weights", "[0.5, -1]", "--again", path) == 0
        assert rewards_of(path) == [[-9.5, -8.5]]

    def test_groups_without_any_reward_are_counted_and_named(
        self, path: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        groups = [group("a", "b", target=None if n % 2 else 1) for n in range(10)] + [group("a", "b")]
        write_groups(groups, path)
        assert score("--reward", "judge:target", path) == 0
        assert rewards_of(path) == [[None, None] if n % 2 else [1, 1] for n in range(10)] + [[None, None]]
        named = f"{path}, group 2, {path}, group 4, {path}, group 6 and 3 more"
        line = f"{path}: 11 groups scored, 0 had rewards; mean reward 1; no reward for any completion of 6: {named}\n"
        assert capsys.readouterr().out == line
        assert score("--reward", "judge:length", path) == 0
        assert "6 groups scored, 5 had rewards" in capsys.readouterr().out

    def test_out_leaves_the_file_alone(self, path: str) -> None:
        write_groups([group("a", "ab"), group("a", "b", rewards=[3, 4])], path)
        before = Path(path).read_bytes()
        assert score("--reward", "judge:length", path, "--out", "scored.parquet") == 0
        assert Path(path).read_bytes() == before
        assert rewards_of("scored.parquet") == [[1, 2], [3, 4]]

    def test_nothing_to_score_touches_nothing(self, path: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_groups([group("a", "b", rewards=[3, 4])], path)
        before = Path(path).stat()
        assert score("--reward", "judge:length", path) == 0
        assert (Path(path).stat().st_ino, Path(path).stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert capsys.readouterr().out == f"{path}: 0 groups scored, 1 had rewards; --again scores them anew\n"

    @pytest.mark.parametrize(
        ("reward", "line"),
        [
            ("judge:nan_at_four", "{path}, groups 3 to 4: reward function 'nan_at_four' returned nan as value 2"),
            ("judge:raising", "{path}, groups 1 to 2: reward function 'raising' raised RuntimeError: no judge"),
            ("judge:needy", "reward function 'needy' needs 'solution', which is neither a column of the dataset"),
            ("judge:no", "--reward: 'judge:no': module 'judge'"),
            ("nojudge:no", "--reward: 'nojudge:no': there is no module 'nojudge'"),
            ("exact", "--reward: no ready-made reward is named 'exact'"),
        ],
    )
    def test_a_function_that_fails_leaves_the_file_and_nothing_else(
        self,
        path: str,
        reward: str,
        line: str,
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(score_module, "TOGETHER", 2)
        write_groups([group("a", "b"), group("a"), group("a", "b"), group("abcd")], path)
        before = Path(path).read_bytes()
        assert score("--reward", reward, path) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo score: {line.format(path=path)}")
        assert Path(path).read_bytes() == before
        assert {entry.name for entry in here.iterdir()} <= {"judge.py", "__pycache__", path}


def test_functions_get_a_few_groups_at_a_time_and_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "TOGETHER", 3)
    # The column is missing in the first call's groups: the function gets None for each then, as in training.
    write_groups([group("a", "b")] * 4 + [group("a", "b", target=2)] * 3, "groups.jsonl")
    assert score("--reward", "judge:target", "--reward", "judge:length", "groups.jsonl") == 0
    assert rewards_of("groups.jsonl") == [[1, 1]] * 4 + [[3, 3]] * 3
    # One group a call: 7 of 2 members.
    assert calls() == [2] * 7
    assert (
        score(
            "--reward", "judge:target", "--reward", "judge:length", "--reward_workers", "0", "--again", "groups.jsonl"
        )
        == 0
    )
    assert calls() == [2] * 7 + [6, 6, 2]


def test_rows_of_a_dataset_become_groups() -> None:
    Path("rows.jsonl").write_text('{"prompt": "p", "completions": ["a", "abc"], "target": 2}\n')
    assert score("--reward", "judge:target", "--reward", "judge:length", "rows.jsonl") == 0
    [scored] = read_groups("rows.jsonl")
    assert (scored.rewards, scored.columns) == ([3, 5], {"target": 2})
    assert {one.source for one in scored.completions} == {"dataset"}


def test_a_folder_is_its_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "c.parquet"):
        write_groups([group("a", "b")], Path("folder") / name)
    assert score("--reward", "judge:length", "folder", "folder/../folder/a.jsonl", "folder/c.parquet", "--again") == 0
    assert capsys.readouterr().out.endswith("3 groups scored, 0 had rewards; mean reward 1\n")
    scored = [name for name in ("a.jsonl", "b.jsonl", "c.parquet") if rewards_of(f"folder/{name}") == [[1, 1]]]
    assert scored == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert rewards_of("folder/.hidden.jsonl") == [[None, None]]


def test_groups_that_come_meanwhile_are_kept_for_the_next_time(capsys: pytest.CaptureFixture[str]) -> None:
    write_groups([group("a", "b")], "groups.jsonl")
    assert score("--reward", "judge:appending", "groups.jsonl") == 0
    assert rewards_of("groups.jsonl") == [[1, 1], [None], [None]]
    assert "1 group scored, 0 had rewards; mean reward 1; 2 came meanwhile" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no.jsonl"], "no.jsonl: no such file; check the path"),
        (["judge.py"], "judge.py: unknown extension '.py'; groups are kept in .jsonl or .parquet files"),
        (["torn.jsonl"], "torn.jsonl, line 2: not JSON"),
        (["blank.jsonl"], "blank.jsonl: no rows, the file is empty"),
        (["prompts.jsonl"], "prompts.jsonl, line 1, field 'completions': missing"),
        (["empty"], "empty: no .jsonl files in it; name a folder that gvpo sample wrote, or a file"),
        (["good.jsonl", "torn.jsonl"], "torn.jsonl, line 2: not JSON"),
        (["good.jsonl", "torn.jsonl", "--out", "x.jsonl"], "--out: takes the groups of one file; name one, or leave"),
        (["folder", "--out", "x.jsonl"], "--out: takes the groups of one file; name one, or leave"),
        (["good.jsonl", "--out", "x.csv"], "x.csv: unknown extension '.csv'"),
        (["good.jsonl", "--out", "no/x.jsonl"], "no/x.jsonl: the folder no does not exist; make it first"),
        (["good.jsonl", "--reward_weights", "[1, 2]"], "--reward_weights: 2 weights for 1 of --reward; give one each"),
        (["good.jsonl", "--reward_weights", "many"], "--reward_weights: input should be a valid list, got 'many'"),
        (["good.jsonl", "--reward_weights", "[.nan]"], "--reward_weights: input should be a finite number, got nan"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_all_as_it_was(
    arguments: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("good.jsonl", "torn.jsonl", "folder/a.jsonl"):
        Path(path).parent.mkdir(exist_ok=True)
        write_groups([group("a", "b")], path)
    with Path("torn.jsonl").open("a") as file:
        file.write('{"prompt": "p", "compl')
    Path("empty").mkdir()
    Path("blank.jsonl").touch()
    Path("prompts.jsonl").write_text('{"prompt": "p"}\n')
    before = {path: path.read_bytes() for path in here.rglob("*.jsonl")}
    assert score("--reward", "judge:length", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo score: {line}")
    assert {path: path.read_bytes() for path in here.rglob("*.jsonl")} == before
    assert calls() == []
