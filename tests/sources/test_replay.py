"""The replay buffer: what it keeps, what it gives back, and that nothing depends on anything but the seed."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.sources.dataset import Row
from gvpo.sources.replay import ReplayBuffer
from gvpo.sources.specs import ReplaySpec


def group(prompt: int, first: int, rewards: tuple[float | None, ...] = (0.0, 1.0), source: str = "policy") -> Group:
    """A group whose members are [first], [first + 1], ..."""
    members = [
        Completion(None, [first + place], reward=reward, source=source, ref_logprob=-3.0)
        for place, reward in enumerate(rewards)
    ]
    return Group(None, members, prompt_ids=[prompt], columns={"answer": prompt})


def row(prompt: int) -> Row:
    return Row(None, [prompt], {}, (), f"row {prompt}")


def buffer(**settings: object) -> ReplayBuffer:
    return ReplayBuffer(ReplaySpec(**{"members": 2, **settings}), None)  # pyright: ignore[reportArgumentType]


def held(replay: ReplayBuffer) -> list[int]:
    """The first token of every group that is held, sorted."""
    return sorted(one.completions[0].token_ids[0] for one in replay.whole(10**6, 0))  # pyright: ignore


def test_members_come_from_groups_of_the_same_prompt() -> None:
    replay = buffer()
    replay.add([group(1, 10), group(2, 20)])
    (of_one, of_two, of_three) = replay.fill([row(1), row(2), row(3)], [2, 1, 2], [0, 1, 2])
    assert [one.token_ids for one in of_one] == [[10], [11]] and [one.reward for one in of_one] == [0.0, 1.0]
    assert len(of_two) == 1 and of_two[0].token_ids in ([20], [21])
    assert of_three == []
    assert all(one.source == "replay" for one in of_one)


def test_a_reference_log_prob_is_not_kept() -> None:
    replay = buffer(groups=1)
    replay.add([group(1, 10)])
    assert all(one.ref_logprob is None for one in replay.fill([row(1)], [2], [0])[0])
    assert all(one.ref_logprob is None for one in replay.whole(1, 0)[0].completions)


def test_a_member_is_drawn_from_the_group_it_was_made_for_alone() -> None:
    replay = buffer()
    mixed = group(1, 10, (0.0, 1.0, 0.5))
    mixed.completions[0].source, mixed.completions[1].source = "replay", "demonstration"
    replay.add([mixed])
    (members,) = replay.fill([row(1)], [2], [0])
    assert [one.token_ids for one in members] == [[12]]


def test_the_quota_of_members_bounds_what_is_wanted() -> None:
    replay = buffer(members=1)
    replay.add([group(1, 10, (0.0, 1.0, 2.0))])
    assert [len(found) for found in replay.fill([row(1), row(1)], [3, 0], [0, 0])] == [1, 0]


def test_what_teaches_nothing_is_not_kept_nor_members_without_a_reward() -> None:
    replay = buffer()
    replay.add([group(1, 10, (1.0, None)), group(2, 20, (1.0, None, 0.0))])
    assert len(replay) == 1
    assert sorted(one.token_ids[0] for one in replay.fill([row(2)], [2], [0])[0]) == [20, 22]  # pyright: ignore


def test_capacity_counts_groups_and_the_oldest_go() -> None:
    replay = buffer(capacity=3, priority="recency")
    for rollout in range(3):
        replay.rollout = rollout
        replay.add([group(rollout, 10 * rollout + 2 * n) for n in range(2)])
    assert held(replay) == [12, 20, 22]


def test_spread_keeps_the_groups_that_tell_most() -> None:
    replay = buffer(capacity=2, priority="spread")
    rewards = [(0.0, 0.1), (0.0, 1.0), (0.5, 0.5), (0.0, 0.4)]
    replay.add([group(n, 10 * n, pair) for n, pair in enumerate(rewards)])
    assert held(replay) == [10, 30]


def test_a_prompts_quota() -> None:
    replay = buffer(per_prompt=2, priority="uniform")
    replay.add([group(1, 10), group(1, 12), group(2, 20), group(1, 14)])
    assert held(replay) == [12, 14, 20]


@pytest.mark.parametrize(
    ("priority", "expected"),
    [("uniform", [1, 1, 1]), ("recency", [1 / 3, 1 / 2, 1]), ("spread", [pstdev([0, 1]), pstdev([0, 3]), 0])],
)
def test_groups_are_replayed_in_proportion_to_their_weight(priority: str, expected: list[float]) -> None:
    replay = buffer(groups=1, priority=priority)
    for rollout, top in enumerate((1.0, 3.0, 0.0)):
        replay.rollout = rollout
        replay.add([group(rollout, rollout, (0.0, top))])
    draws = 4000
    counts = Counter(replay.whole(1, seed)[0].prompt_ids[0] for seed in range(draws))  # pyright: ignore
    # Of a single draw the probability is exactly weight / sum; five standard deviations of a share are at most 0.04.
    for prompt, weight in enumerate(expected):
        assert counts[prompt] / draws == pytest.approx(weight / sum(expected), abs=0.04)


def test_a_group_without_weight_comes_only_when_no_other_is_left() -> None:
    replay = buffer(groups=2, priority="spread")
    replay.add([group(1, 10, (1.0, 1.0)), group(2, 20)])
    assert all([one.prompt_ids for one in replay.whole(1, seed)] == [[2]] for seed in range(50))
    assert len(replay.whole(2, 0)) == 2


def test_whole_groups_bring_their_rewards_columns_and_no_duplicates() -> None:
    replay = buffer(groups=3)
    replay.add([group(n, 10 * n, (0.25, 0.75)) for n in range(5)])
    rows = replay.whole(3, 1)
    assert len({one.prompt_ids[0] for one in rows}) == 3  # pyright: ignore[reportOptionalSubscript]
    assert all(one.offline and one.has_rewards and one.columns == {"answer": one.prompt_ids[0]} for one in rows)  # pyright: ignore
    assert {member.source for one in rows for member in one.completions} == {"replay"}


def test_draws_are_a_function_of_the_seed() -> None:
    replay = buffer(groups=2)
    replay.add([group(n, 10 * n) for n in range(8)])
    assert replay.whole(2, 5) == replay.whole(2, 5)
    assert any(replay.whole(2, 5) != replay.whole(2, seed) for seed in range(6, 12))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    replay, other = buffer(groups=2), buffer(groups=2)
    replay.rollout = 5
    replay.add([group(n, 10 * n) for n in range(8)])
    other.add([group(99, 99)])
    replay.save(tmp_path)
    other.load(tmp_path)
    assert other.whole(8, 1) == replay.whole(8, 1) and len(other) == 8 and other.rollout == 5
    # What is done afterwards does not reach the copy.
    other.add([group(50, 50)])
    third = buffer(groups=2)
    third.load(tmp_path)
    assert third.whole(9, 1) == replay.whole(9, 1)


def test_a_full_disk_is_one_line_and_what_was_held_stays() -> None:
    replay = buffer(groups=1)
    replay.add([group(1, 10)])
    (pages,) = replay._db.execute("PRAGMA page_count").fetchone()
    replay._db.execute(f"PRAGMA max_page_count = {pages}")
    large = group(2, 20)
    large.columns["text"] = "x" * 10**5
    with pytest.raises(UserError, match=r"TMPDIR.*full.*make room on the disk and resume, or lower capacity"):
        replay.add([large])
    assert held(replay) == [10]


@pytest.mark.parametrize("read", [lambda held: held.whole(2, 0), lambda held: held.fill([row(1)], [2], [0])])
def test_a_full_disk_while_groups_are_read_is_one_line(read: Any) -> None:
    """SQLite makes room in memory for what it reads by writing what it holds."""
    replay = buffer(groups=2, members=1)
    replay._db.close()
    replay._db = Full()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"TMPDIR.*full; make room on the disk and resume"):
        read(replay)


class Full:
    """A connection to a database whose disk is full."""

    def execute(self, *query: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")


def test_an_empty_buffer_gives_nothing(tmp_path: Path) -> None:
    replay = buffer(groups=2)
    assert replay.whole(2, 0) == [] and replay.fill([row(1)], [2], [0]) == [[]]
    assert replay.ages() == {"replay/groups": 0.0}
    replay.save(tmp_path)
    replay.load(tmp_path)
    assert len(replay) == 0
