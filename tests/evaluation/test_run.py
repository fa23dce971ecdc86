"""Batches, seeds and what a run's file may hold, with completions that cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gvpo.errors import UserError
from gvpo.evaluation.run import Drawer, evaluate_task, groups_there, problem_seed
from gvpo.group_files import append_groups, read_groups
from gvpo.groups import Completion
from gvpo.rewards.resolve import resolve_rewards
from gvpo.sources.dataset import Row

ROWS = [Row(f"p{n}", None, {"answer": "x"}, (), f"row {n}", f"t/{n}") for n in range(7)]


class Echo:
    """Answers with the prompt, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str | None]] = []
        self.seeds: list[int] = []

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        self.asked.append([row.id for row in rows])
        self.seeds += seeds
        return [[Completion(str(row.prompt))] * count for row, count in zip(rows, wanted, strict=True)]


def evaluate(path: Path, echo: Echo, *, seed: int = 0, batch: int = 3, stop_at: int = 99) -> bool:
    drawer = Drawer(echo, None, resolve_rewards("exact_match"), ("answer",), lambda asked: [], 1, seed)
    return evaluate_task(ROWS, path, drawer, batch, lambda there: there < stop_at)


def test_a_batch_that_was_stopped_is_drawn_whole(tmp_path: Path) -> None:
    """A draw may depend, by a rounding, on who it is drawn with."""
    whole, part = Echo(), Echo()
    assert evaluate(tmp_path / "whole.jsonl", whole)
    groups = list(read_groups(tmp_path / "whole.jsonl"))
    append_groups(groups[:4], tmp_path / "part.jsonl")
    assert evaluate(tmp_path / "part.jsonl", part)
    assert part.asked == whole.asked[1:] == [["t/3", "t/4", "t/5"], ["t/6"]]
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_it_stops_between_batches_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert not evaluate(path, Echo(), stop_at=3)
    assert groups_there(path, ROWS) == 3
    assert evaluate(path, Echo())
    idle = Echo()
    assert evaluate(path, idle)
    assert idle.asked == []
    assert [group.id for group in read_groups(path)] == [row.id for row in ROWS]


def test_seeds_are_the_problems_own(tmp_path: Path) -> None:
    seeds = {}
    for seed, batch in ((0, 3), (0, 7), (1, 3)):
        echo = Echo()
        assert evaluate(tmp_path / f"{seed}-{batch}.jsonl", echo, seed=seed, batch=batch)
        seeds[seed, batch] = echo.seeds
    assert seeds[0, 3] == seeds[0, 7]
    assert len({*seeds[0, 3], *seeds[1, 3]}) == 14
    assert problem_seed(0, "a/1") != problem_seed(0, "b/1")


@pytest.mark.parametrize("ids", [["t/1"], ["t/0", "t/2"], [f"t/{n}" for n in range(8)]])
def test_a_file_of_others_is_refused(ids: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    append_groups([Row("p", None, {}, (), "", name).group([Completion("a")]) for name in ids], path)
    with pytest.raises(UserError, match=rf"t\.jsonl, group {len(ids)}: of problem {ids[-1]}, expected"):
        groups_there(path, ROWS)


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert evaluate(path, Echo())
    whole = path.read_bytes()
    for end, there in ((len(whole), 7), (len(whole) - 1, 6), (len(whole) // 2, None), (3, 0), (0, 0)):
        path.write_bytes(whole[:end])
        left = whole[:end].count(b"\n")
        assert groups_there(path, ROWS) == left
        assert there in (None, left)
        assert path.read_bytes() == whole[: whole[:end].rfind(b"\n") + 1]
