"""Groups that were trained on before: members for new groups of their prompt, and whole groups again.

The unit is the group. What is kept is token ids and rewards, never a log-prob under a reference: replayed members are
scored under the current one. Groups lie in a temporary SQLite database, which keeps a few pages in memory and the rest
on disk, whatever the capacity; a checkpoint holds a copy of it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import pstdev
from typing import Any

import numpy as np

from gvpo.errors import UserError
from gvpo.groups import Completion, Group, group_from_dict, group_to_dict, teaching
from gvpo.sources.dataset import Row
from gvpo.sources.source import prompt_ids
from gvpo.sources.specs import ReplaySpec

FILE = "replay.sqlite"

_TABLE = """CREATE TABLE groups (
    number INTEGER PRIMARY KEY,  -- in the order of arrival
    prompt BLOB NOT NULL,        -- a hash of the prompt's token ids
    rollout INTEGER NOT NULL,    -- that the group was drawn in
    spread REAL NOT NULL,        -- standard deviation of its rewards
    fresh TEXT NOT NULL,         -- places of the members that were drawn for this group
    row TEXT NOT NULL)"""


class ReplayBuffer:
    """At most spec.capacity groups, spec.per_prompt of each prompt; also a Source of members. One process's copy."""

    def __init__(self, spec: ReplaySpec, tokenizer: Any | None) -> None:
        self.spec = spec
        self.rollout = 0
        self._tokenizer = tokenizer
        # Without a name SQLite makes a file of its own in the folder for temporary files, gone when the process is.
        # A trainer may be made in one thread and train in another.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute(_TABLE)
        self._db.execute("CREATE INDEX by_prompt ON groups (prompt)")

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM groups").fetchone()[0]

    def add(self, groups: Sequence[Group]) -> None:
        """Keep what of these groups can teach; then drop what is least worth keeping of what is too many.

        Members that came from the buffer are kept as part of their new group, and are not drawn from it again: they are
        in the group that they were drawn for.
        """
        kept = [group for one in groups if (group := teaching(one)) is not None]
        with _disk():
            self._db.executemany(
                "INSERT INTO groups (prompt, rollout, spread, fresh, row) VALUES (?, ?, ?, ?, ?)",
                [self._values(group) for group in kept],
            )
            if self.spec.per_prompt is not None:
                self._drop_beyond_quota(self.spec.per_prompt, {_key(group.prompt_ids) for group in kept})
            self._drop(self._columns(), self.spec.capacity)

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """Earlier members of each row's prompt, spec.members and wanted[i] at most."""
        counts = [min(self.spec.members, count) for count in wanted]
        with _disk():
            return [
                self._members(prompt_ids(row, self._tokenizer), count, seed) if count > 0 else []
                for row, count, seed in zip(rows, counts, seeds, strict=True)
            ]

    def whole(self, count: int, seed: int) -> list[Row]:
        """At most `count` different groups, as rows that bring their own completions and rewards."""
        with _disk():  # reading makes room for a page by writing another one
            columns = self._columns()
            chosen = _choose(self._weights(columns), count, seed)
            return [_row(self._group(int(columns["number"][place]))) for place in chosen]

    def ages(self) -> dict[str, float]:
        """What the metrics say of it: groups held, and their mean age in rollouts."""
        with _disk():
            held, age = self._db.execute("SELECT count(*), avg(? - rollout) FROM groups", (self.rollout,)).fetchone()
        return {"replay/groups": float(held)} | ({"replay/age": age} if held else {})

    def save(self, folder: Path) -> None:
        """Copy the groups, and the rollout that their age counts to, into a file of this folder."""
        with _disk(folder):
            self._db.execute(f"PRAGMA user_version = {self.rollout}")
            self._db.execute("VACUUM INTO ?", (str(folder / FILE),))

    def load(self, folder: Path) -> None:
        """Hold what `save` copied, and nothing else."""
        saved = sqlite3.connect(f"{(folder / FILE).absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        with _disk(), closing(saved):
            saved.backup(self._db)
            (self.rollout,) = self._db.execute("PRAGMA user_version").fetchone()

    def _values(self, group: Group) -> tuple[Any, ...]:
        members = [replace(one, ref_logprob=None, ref_token_logprobs=None) for one in group.completions]
        rewards = [one.reward for one in members if one.reward is not None]
        fresh = [place for place, one in enumerate(members) if one.source not in ("replay", "demonstration")]
        row = json.dumps(group_to_dict(replace(group, completions=members)))
        return _key(group.prompt_ids), self.rollout, pstdev(rewards), json.dumps(fresh), row

    def _members(self, prompt: list[int], count: int, seed: int) -> list[Completion]:
        rows = self._db.execute(
            "SELECT number, rollout, spread, fresh FROM groups WHERE prompt = ? ORDER BY number", (_key(prompt),)
        ).fetchall()
        columns = _as_columns(rows)
        each = self._weights(columns)
        places = [(row, place) for row, (*_, fresh) in enumerate(rows) for place in json.loads(fresh)]
        chosen = sorted(places[one] for one in _choose(np.array([each[row] for row, _ in places]), count, seed))
        members = []
        for row, those in groupby(chosen, key=lambda pair: pair[0]):
            completions = self._group(rows[row][0]).completions
            members += [replace(completions[place], source="replay") for _, place in those]
        return members

    def _group(self, number: int) -> Group:
        (text,) = self._db.execute("SELECT row FROM groups WHERE number = ?", (number,)).fetchone()
        return group_from_dict(json.loads(text))

    def _columns(self, where: str = "TRUE", *values: Any) -> dict[str, np.ndarray]:
        query = f"SELECT number, rollout, spread FROM groups WHERE {where} ORDER BY number"
        return _as_columns(self._db.execute(query, values).fetchall())

    def _weights(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """How much more often than others each of these groups is replayed, and how much longer it is kept."""
        match self.spec.priority:
            case "uniform":
                return np.ones(len(columns["number"]))
            case "recency":
                return 1 / (1 + self.rollout - columns["rollout"])
            case "spread":
                return columns["spread"]

    def _drop(self, columns: dict[str, np.ndarray], keep: int) -> None:
        """Delete the groups of the lowest weights, the oldest of equals, until `keep` of these are left."""
        order = np.lexsort((columns["number"], self._weights(columns)))
        beyond = order[: max(0, len(order) - keep)]
        numbers = [(int(number),) for number in columns["number"][beyond]]
        self._db.executemany("DELETE FROM groups WHERE number = ?", numbers)

    def _drop_beyond_quota(self, quota: int, prompts: set[bytes]) -> None:
        for prompt in prompts:
            self._drop(self._columns("prompt = ?", prompt), quota)


def _choose(weights: np.ndarray, count: int, seed: int) -> list[int]:
    """At most `count` different places, drawn in proportion to their weights; those of weight 0 only when no other is
    left. Sorted. A function of the arguments alone (Efraimidis and Spirakis, 2006: the largest of u ** (1 / w))."""
    uniforms = np.random.default_rng([seed, 1]).random(len(weights))
    with np.errstate(divide="ignore"):
        keys = np.log(uniforms) / weights
    best = np.lexsort((-uniforms, -keys))[:count]
    return sorted(int(place) for place in best)


def _as_columns(rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    names = ("number", "rollout", "spread")
    return {name: np.array([row[place] for row in rows], dtype=float) for place, name in enumerate(names)}


def _row(group: Group) -> Row:
    members = tuple(replace(one, source="replay") for one in group.completions)
    return Row(group.prompt, group.prompt_ids, group.columns, members, "replay buffer", group.id)


def _key(ids: Sequence[int] | None) -> bytes:
    assert ids is not None, "groups are encoded before they are kept"
    return hashlib.blake2b(",".join(map(str, ids)).encode(), digest_size=16).digest()


@contextmanager
def _disk(folder: Path | None = None) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        where = folder or "replay buffer, in the folder for temporary files (TMPDIR)"
        raise UserError(f"{where}: {error}; make room on the disk and resume, or lower capacity") from error
