"""The learning benchmark: its sums are exact, its runs are made once, and what is missing is marked open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "learning"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    yield {name: import_module(name) for name in ("cells", "enumerable", "report", "run")}
    sys.path.remove(str(FOLDER))


def test_the_answers_probabilities_sum_to_one_and_agree_with_plain_forwards(modules: dict[str, ModuleType]) -> None:
    enumerable = modules["enumerable"]
    model = enumerable.make_model(0)
    logps_PA = enumerable.exact_logprobs(model)
    assert torch.allclose(logps_PA.exp().sum(1), torch.ones(8, dtype=torch.float64), atol=1e-6)
    for prompt, answer in ((0, 0), (3, 40), (7, 399)):
        ids = enumerable.PROMPTS[prompt] + enumerable.ANSWERS[answer]
        steps = model(torch.tensor([ids])).logits[0, 2:-1].detach().double().log_softmax(-1)
        direct = sum(float(steps[n, token]) for n, token in enumerate(enumerable.ANSWERS[answer]))
        assert float(logps_PA[prompt, answer]) == pytest.approx(direct, abs=1e-5)


def test_a_rare_task_rewards_20_answers_of_each_prompt(modules: dict[str, ModuleType]) -> None:
    assert modules["enumerable"].make_rewards("rare", 3).sum(1).tolist() == [20.0] * 8


def test_a_run_is_made_once_and_tables_wait_for_all_seeds(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, run, report = (modules[name] for name in ("cells", "run", "report"))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setitem(cells.PROTOCOLS, "rare", cells.Protocol((1e-3, 1e-4), (9,), (0, 1)))
    cell = cells.Cell("staleness", "rare", completions=16, updates=2)
    assert report.entry(cell, None, "after") == "open"
    run.measure(cell)
    rows = run.read_results("rare")
    assert [(row["learning_rate"], row["seed"]) for row in rows[:2]] == [(1e-3, 9), (1e-4, 9)]
    assert [row["seed"] for row in rows[2:]] == [0, 1]
    chosen = max(rows[:2], key=lambda row: row["after"])["learning_rate"]
    assert {row["learning_rate"] for row in rows[2:]} == {chosen}
    run.measure(cell)
    assert run.read_results("rare") == rows
    assert report.entry(cell, None, "after").startswith(f"{(rows[2]['after'] + rows[3]['after']) / 2:.3f} ± ")


def test_the_interval_is_students(modules: dict[str, ModuleType]) -> None:
    # Of 1, 2, 3: mean 2, standard error 1/sqrt(3), and 4.303 is the 97.5 % point with two degrees of freedom.
    assert modules["report"].half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_methods_are_compared_on_as_many_completions_and_updates(modules: dict[str, ModuleType]) -> None:
    cells = modules["cells"]
    for experiment in cells.EXPERIMENTS:
        made = cells.cells_of(experiment, "rare")
        assert len({(cell.completions, cell.updates) for cell in made}) == 1
        assert all(cell.groups_per_update * cell.members == cell.completions for cell in made)
