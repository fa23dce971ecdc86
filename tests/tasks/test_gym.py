"""reasoning-gym's tasks: what becomes of an entry, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from gvpo.errors import UserError
from gvpo.tasks import load_problems


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:leg_counting:many", "task 'gym:leg_counting:many': not of the form gym:NAME[:SIZE[:SEED]]"),
        ("gym:leg_counting:1:2:3", "task 'gym:leg_counting:1:2:3': not of the form"),
        ("gym:leg_counting:5:-1", "task 'gym:leg_counting:5:-1': not of the form"),
        ("gym:leg_counting:0", "task 'gym:leg_counting:0': a SIZE of 0; give 1 or more"),
    ],
)
def test_names_of_another_form(name: str, message: str):
    with pytest.raises(UserError) as error:
        load_problems(name)
    assert str(error.value).startswith(message)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"^task 'gym:leg_counting' needs reasoning-gym: pip install 'gvpo\[tasks\]'$"):
        load_problems("gym:leg_counting")


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("reasoning_gym")

    def test_entries(self):
        import reasoning_gym

        entries = reasoning_gym.create_dataset("leg_counting", size=3, seed=7)
        problems = load_problems("gym:leg_counting:3:7")
        assert [problem.id for problem in problems] == [f"gym:leg_counting:3:7/{i}" for i in range(3)]
        for i, problem in enumerate(problems):
            assert (problem.text, problem.answers) == (entries[i]["question"], [entries[i]["answer"]])
            assert problem.columns["gym_task"] == "leg_counting"
            assert json.loads(json.dumps(problem.columns["gym_entry"])) == problem.columns["gym_entry"]
            assert entries.score_answer(entries[i]["answer"], problem.columns["gym_entry"]) == 1
            assert entries.score_answer("-1", problem.columns["gym_entry"]) < 1

    def test_defaults_and_limit(self):
        few = load_problems("gym:leg_counting", limit=2)
        assert len(few) == 2
        assert [problem.text for problem in few] == [
            problem.text for problem in load_problems("gym:leg_counting:500:0", limit=2)
        ]
        assert few[0].text != load_problems("gym:leg_counting:500:1", limit=1)[0].text
        assert len(load_problems("gym:leg_counting:3", limit=9)) == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "gym:leg_countin",
                "task 'gym:leg_countin': reasoning-gym has no 'leg_countin'; did you mean 'leg_counting'?",
            ),
            ("gym:", "task 'gym:': reasoning-gym has no ''; there is "),
            ("gym:composite", "task 'gym:composite': needs settings that cannot be given here"),
            ("gym:graph_color:2", "gym:graph_color:2, entry 0: reasoning-gym gives no answer"),
            ("gym:arc_agi:1", "task 'gym:arc_agi:1': its entries lose their meaning as JSON"),
        ],
    )
    def test_refused(self, name: str, message: str):
        with pytest.raises(UserError) as error:
            load_problems(name)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)

    def test_an_empty_answer(self, monkeypatch: pytest.MonkeyPatch):
        from reasoning_gym.arithmetic.leg_counting import LegCountingDataset

        whole = LegCountingDataset.__getitem__

        def second_is_empty(self: LegCountingDataset, i: int) -> dict:
            return whole(self, i) | ({"answer": " "} if i == 1 else {})

        monkeypatch.setattr(LegCountingDataset, "__getitem__", second_is_empty)
        with pytest.raises(
            UserError, match=r"^gym:leg_counting:3, entry 1: its answer is empty; take another task, SIZE"
        ):
            load_problems("gym:leg_counting:3")
