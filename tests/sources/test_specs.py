"""What a config may say of sources, and the one line for what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion
from gvpo.sources.dataset import Row
from gvpo.sources.demonstration import demonstrations
from gvpo.sources.mixture import Mixture, arrange
from gvpo.sources.specs import DemonstrationSpec, PolicySpec, ReplaySpec, read_sources
from gvpo.training.config import ConfigError, RunConfig

POLICY = {"type": "policy"}


def test_mappings_become_specs_and_sources_of_ones_own_stay() -> None:
    class Own:
        def fill(self, rows: Any, wanted: Any, seeds: Any) -> Any: ...

    own = Own()
    assert read_sources([POLICY, {"type": "replay", "members": 2}, own]) == [PolicySpec(), ReplaySpec(members=2), own]
    assert read_sources(None) == [PolicySpec()]
    assert read_sources(own) == [own] and read_sources(POLICY) == [PolicySpec()]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "sources: an empty list"),
        (["policy"], r"sources\[0\]: a str; give a mapping such as \{type: policy\}"),
        ([{"type": "polcy"}], r"sources\[0\], field 'type': 'polcy' is unknown; did you mean 'policy'"),
        ([POLICY, {"type": "replay"}], r"sources\[1\]: replays nothing; give members"),
        ([{"type": "replay", "member": 2}], r"sources\[0\], field 'member': unknown; did you mean 'members'"),
        ([{"type": "replay", "members": -1}], "field 'members': input should be greater than or equal to 0, got -1"),
        ([{"type": "files"}], "field 'path': field required"),
        ([{"type": "demonstration", "column": "x", "reward": float("nan")}], "field 'reward'"),
        ([{"type": "demonstration", "column": "x", "reward": float("inf")}], "field 'reward': give a finite number"),
    ],
)
def test_a_wrong_source_is_one_line(sources: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sources(sources)


def test_a_config_names_its_own_field() -> None:
    with pytest.raises(ConfigError, match=r"config, field 'sources': sources\[0\], field 'capcity': unknown"):
        RunConfig(sources=[{"type": "replay", "members": 1, "capcity": 3}])
    assert RunConfig(sources=[{"type": "replay", "members": 1}]).sources == [ReplaySpec(members=1)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([POLICY, POLICY], "'policy' is given twice"),
        ([POLICY, {"type": "replay", "groups": 3}], "3 whole groups leave no place for a new one"),
        ([POLICY, {"type": "replay", "members": 4}], "4 members from other sources leave the policy none"),
        ([{"type": "teacher", "model": "m", "members": 5}], "5 members are more than num_generations=4"),
        ([{"type": "demonstration", "column": "a"}], "one completion a group teaches nothing"),
        ([{"type": "replay", "groups": 1}], "replay alone has nothing to replay"),
        ([POLICY, {"type": "files", "path": "x"}], "files beside other sources need groups"),
        ([{"type": "files", "path": "x", "groups": 1}], "files alone make up every update"),
        ([POLICY, {"type": "replay", "groups": 2}, {"type": "files", "path": "x", "groups": 2}], "4 whole groups are"),
    ],
)
def test_sources_that_do_not_go_together(sources: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(tuple(read_sources(sources))).check(num_generations=4, groups_per_update=3)


def rows(*names: str) -> list[Row]:
    return [Row(name, None, {}, (), name) for name in names]


def test_whole_groups_are_shared_out_over_the_updates() -> None:
    arranged = arrange(rows("A", "B", "C"), rows("a", "b", "c", "d", "e"), 2)
    assert [row.where for row in arranged] == ["A", "C", "a", "b", "B", "c", "d", "e"]
    assert arrange([], rows("a", "b"), 2) == rows("a", "b")
    assert arrange(rows("A", "B"), [], 2) == rows("A", "B")


def row(**columns: Any) -> Row:
    return Row("What?", None, columns, (), "data, line 3")


def answers(given: Row, **settings: Any) -> list[tuple[str | None, float | None]]:
    found: list[Completion] = demonstrations(given, DemonstrationSpec(column="answer", **settings))
    assert all(one.source == "demonstration" for one in found)
    return [(one.text, one.reward) for one in found]


def test_demonstrations_of_a_row() -> None:
    assert answers(row(answer="4")) == [("4", None)]
    assert answers(row(answer=["4", "four"]), reward=1) == [("4", 1.0), ("four", 1.0)]
    assert answers(row(answer=["4", "four"], marks=[1, 0.5]), reward="marks") == [("4", 1.0), ("four", 0.5)]
    assert answers(row(answer=None)) == answers(row()) == []


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (row(answer=4), {}, "data, line 3, field 'answer': answer 0 .from 0. is 4; give a string"),
        (row(answer=["4", " "]), {}, "answer 1 .from 0. is ' '; give a string that is not empty"),
        (row(answer="4", marks=[1, 2]), {"reward": "marks"}, "field 'marks': 2 rewards for 1 answers"),
        (row(answer="4"), {"reward": "marks"}, "field 'marks': missing"),
        (row(answer="4", marks=float("nan")), {"reward": "marks"}, "field 'marks': nan is non-finite"),
    ],
)
def test_what_is_no_demonstration(given: Row, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answers(given, **settings)
