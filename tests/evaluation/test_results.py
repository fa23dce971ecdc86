"""Results and tables of groups made by hand."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import pytest

from gvpo.evaluation import results as results_module
from gvpo.evaluation.estimators import percentiles, resampled_means, wilson
from gvpo.evaluation.results import suite_results, task_results
from gvpo.evaluation.tables import p_value, results_text, table
from gvpo.groups import Completion, Group


def one(reward: float | None, length: int | None = None, vote: int | None = None, **more: Any) -> Completion:
    ids = None if length is None else [1] * length
    return Completion("text", ids, reward=reward, meta={"vote": vote, "answer": vote, **more.pop("meta", {})}, **more)


def problems(*members: list[Completion]) -> list[Group]:
    return [Group("p", completions, id=f"t/{n}") for n, completions in enumerate(members)]


class TestTask:
    def test_one_completion_a_problem(self) -> None:
        groups = problems([one(1.0, 10, 0)], [one(0.0, 20, 0)], [one(None, 40)], [one(0.0, 50, 0, truncated=True)])
        found = task_results(groups, 0)
        low, high = percentiles(resampled_means([1.0, 0.0, 0.0, 0.0], 0))
        assert found == {
            "problems": 4,
            "num_samples": 1,
            "pass@1": 0.25,
            "interval": {"low": low, "high": high, "by": "bootstrap"},
            "right": 1,
            "unscored": 1,
            "failures": {},
            "truncated": 0.25,
            "without_answer": 0.25,
            "mean_reward": None,
            "mean_length": 30.0,
            "mean_length_right": 10.0,
            "mean_length_wrong": fmean([20, 40, 50]),
        }

    def test_several_completions_a_problem(self) -> None:
        groups = problems(
            [one(1.0, vote=0), one(1.0, vote=0), one(0.0, vote=1), one(0.0, vote=2)],  # the right one wins
            [one(1.0, vote=0), one(0.0, vote=1), one(0.0, vote=1), one(0.0)],  # a wrong one wins
            [one(1.0, vote=0), one(0.0, vote=1), one(0.0), one(None)],  # a draw
        )
        found = task_results(groups, 0)
        assert found["pass@1"] == 4 / 12
        assert found["maj@k"] == 0.5
        # pass@2 = 1 - C(4 - c, 2) / C(4, 2): 1 - 1/6 for c = 2, 1 - 3/6 for c = 1.
        assert found["pass@"] == {"1": pytest.approx(4 / 12), "2": pytest.approx((5 / 6 + 1 / 2 + 1 / 2) / 3), "4": 1.0}
        assert (found["unscored"], found["right"], found["uncompared"]) == (1, 4, 0)

    @pytest.mark.parametrize("reward", [0.0, 1.0])
    def test_all_alike_have_wilsons_interval(self, reward: float) -> None:
        low, high = wilson(reward, 30)
        found = task_results(problems(*[[one(reward)] for _ in range(30)]), 0)
        assert found["interval"] == {"low": low, "high": high, "by": "wilson"}

    def test_right_is_a_reward_of_one_or_more(self) -> None:
        found = task_results(problems([one(0.99)], [one(1.0)], [one(1.5)], [one(None)]), 0)
        assert (found["right"], found["mean_reward"]) == (2, pytest.approx((0.99 + 1 + 1.5) / 3))

    def test_lengths_that_a_server_counts(self) -> None:
        alone = problems([one(1.0, meta={"tokens": 10})], [one(0.0, meta={"tokens": 30})])
        together = problems([one(reward, meta={"mean_tokens": 20.0}) for reward in (1.0, 0.0)])
        unknown = problems([one(1.0, meta={"tokens": 10})], [one(0.0)])
        lengths = [
            [task_results(groups, 0)[f"mean_length{which}"] for which in ("", "_right", "_wrong")]
            for groups in (alone, together, unknown)
        ]
        assert lengths == [[20.0, 10.0, 30.0], [20.0, None, None], [None, 10.0, None]]


SETTINGS = {
    "model": "m",
    "seed": 3,
    "tasks": {"a": {"temperature": 0.0, "top_p": 1.0, "reward": "x"}, "b": {"reward": "x"}},
}


class TestSuite:
    def test_the_average_weighs_tasks_alike(self) -> None:
        a = problems([one(1.0)], [one(0.0)])
        b = problems(*[[one(float(n < 2))] for n in range(8)])
        found = suite_results(SETTINGS, {"a": a, "b": b})
        assert found["average"]["pass@1"] == (0.5 + 0.25) / 2
        means = [
            resampled_means([1.0, 0.0], results_module._seeds(3, "a")),
            resampled_means([1.0] * 2 + [0.0] * 6, results_module._seeds(3, "b")),
        ]
        low, high = percentiles(np.mean(means, axis=0))
        assert found["average"]["interval"] == {"low": low, "high": high, "by": "bootstrap"}

    def test_a_task_without_a_spread_leaves_the_average_without_an_interval(self) -> None:
        found = suite_results(SETTINGS, {"a": problems([one(1.0)], [one(0.0)]), "b": problems([one(1.0)])})
        assert (found["average"]["pass@1"], found["average"]["interval"]) == (0.75, None)

    def test_equal_groups_have_equal_results(self) -> None:
        groups = {"a": problems([one(1.0)], [one(0.0)], [one(0.0)])}
        assert suite_results(SETTINGS, groups) == suite_results(SETTINGS, groups)


class TestTables:
    def test_what_is_shown(self) -> None:
        groups = {
            "a": problems(
                [one(1.0, 10)], [one(None, 20, meta={"reward_failures": {"x": "hang: no answer within 30 s"}})]
            ),
            "b": problems([one(1.0, vote=0), one(0.0, vote=1)], [one(1.0, vote=0), one(0.0, vote=1)]),
        }
        text = results_text(suite_results(SETTINGS, groups))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 120
        assert lines[0] == "model m, seed 3, temperature 0, top_p 1, reward x"
        assert lines[3].split()[:4] == ["a", "2", "1", "50.00"]
        assert " w " in lines[4] and "Wilson" in text
        assert lines[5].split() == ["average", "50.00", "-"]
        assert "a: 1 completions have no verdict, and count as not right (the reward function failed: 1 hang)\n" in text
        assert [line.split() for line in lines[6:8]] == [
            ["task", "maj@k", "pass@1", "pass@2"],
            ["b", "50.00", "50.00", "100.00"],
        ]

    def test_tasks_that_are_drawn_differently_are_named(self) -> None:
        tasks = {
            name: {"temperature": heat, "top_p": 1.0, "reward": "x"} for name, heat in (("a", 0), ("b", 1), ("c", 0))
        }
        groups = {name: problems([one(1.0)]) for name in tasks}
        text = results_text(suite_results({"seed": 0, "tasks": tasks}, groups))
        first, *_ = text.splitlines()
        assert first == "seed 0, temperature 0, top_p 1 (a, c), temperature 1, top_p 1 (b), reward x"

    def test_names_are_no_markup(self) -> None:
        assert table(["task", "n"], [["[bold]x[/bold]", 1], [":smile:", 2]]).splitlines()[1:] == [
            "[bold]x[/bold]  1",
            ":smile:         2",
        ]

    def test_no_column_is_cut(self) -> None:
        name = "a-task-with-a-name-as-long-as-that-of-a-file-may-be" * 3
        groups = {name: problems([one(1.0, 10), one(0.5, 10)])}
        groups[name][0].completions[0].meta["uncompared"] = 3
        text = results_text(suite_results({"seed": 0, "tasks": {name: {"reward": "x"}}}, groups))
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert row.split()[1:4] == ["1", "2", "50.00"] and row.endswith("0.750")
        assert text.endswith(f"{name}: 3 comparisons of answers failed, which count as different in maj@k\n")

    @pytest.mark.parametrize(
        ("p", "text"), [(1.0, "1.000"), (0.03125, "0.031"), (0.00012345, "1.2e-04"), (0.0, "< 1e-300")]
    )
    def test_p_values(self, p: float, text: str) -> None:
        assert p_value(p) == text
