"""The benchmarks of learning and of the step: their sums are exact, their work is as prescribed, runs are made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "learning"
STEP = FOLDER.parent / "step"


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


@pytest.fixture(scope="module")
def step() -> Iterator[dict[str, ModuleType]]:
    """The modules of benchmarks/step, some of which are named as others' are."""
    names = ("cases", "forced", "measure", "plain", "report", "run")
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(STEP))
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(STEP))
    for name in names:
        del sys.modules[name]
    sys.modules.update(hidden)


def test_operations_of_a_step_are_those_counted_by_hand(step: dict[str, ModuleType]) -> None:
    # A layer: queries and output 4*4 each, keys and values 4*2 each, three of 4*8: 144 weights; two layers, head 4*10.
    shape = step["measure"].Shape(4, 8, 2, 2, 1, 2, 10)
    case = step["cases"].Case("", prompts=1, k=2, prompt_tokens=3, max_tokens=1)
    # The prompt is read once; the one token of each completion is drawn, hence scored, and never read.
    forward = 2 * (288 * 3 + 40 * 2)
    assert step["measure"].operations(shape, case) == {"generation": forward, "training": 3 * forward}


def test_the_main_case_is_the_one_that_is_named(step: dict[str, ModuleType]) -> None:
    lengths = [length for group in step["cases"].MAIN.lengths for length in group]
    assert (len(lengths), max(lengths), sum(lengths)) == (64, 32, 64 * 25)


def test_generate_ends_where_it_is_told_to(step: dict[str, ModuleType]) -> None:
    forced, plain = step["forced"], step["plain"]
    case = step["cases"].Case("", prompts=2, k=3, prompt_tokens=4, max_tokens=9, model=step["cases"].Llama(192, 1, 50))
    model, _ = forced.make_model(case)
    _, prompts = forced.make_prompts(case, None)
    forced.force_generate(model, case, prompts, [2, 5])
    rows_NT = torch.tensor(prompts).repeat_interleave(case.k, 0)
    sequences_NT = plain.sample(model, rows_NT, case.max_tokens, 0)
    completions, _ = plain.cut(sequences_NT[:, case.prompt_tokens :], 2)
    assert [len(ids) for ids in completions] == [length for group in case.lengths for length in group]
    assert all(ids[-1] == 2 and not {2, 5} & set(ids[:-1]) for ids in completions)
    with pytest.raises(AssertionError, match="not of"):
        forced.check_lengths(case, completions[1:])
    with pytest.raises(AssertionError, match="another order"):
        plain.sample(model, rows_NT.flip(0), case.max_tokens, 0)


def test_the_plain_loop_has_the_same_gradient(step: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    from gvpo import Completion, Group, accumulate_gradients, sequence_logprobs

    forced, plain = step["forced"], step["plain"]
    case = step["cases"].Case("", prompts=3, k=4, prompt_tokens=4, max_tokens=6, model=step["cases"].Llama(192, 1, 50))
    (model, _), (other, _) = forced.make_model(case), forced.make_model(case)
    _, prompts = forced.make_prompts(case, None)
    forced.force_generate(model, case, prompts, [2])
    sequences_NT = plain.sample(model, torch.tensor(prompts).repeat_interleave(4, 0), case.max_tokens, 0)
    completions, mask_NT = plain.cut(sequences_NT[:, 4:], 2)
    rewards = forced.reward(completions)
    assert all(len(set(rewards[start : start + 4])) > 1 for start in (0, 4, 8))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    plain.update(model, optimizer, sequences_NT, mask_NT, plain.group_weights(torch.tensor(rewards), 4), "float32")
    members = [Completion(token_ids=ids, reward=reward) for ids, reward in zip(completions, rewards, strict=True)]
    groups = [Group(None, members[4 * n : 4 * n + 4], prompt_ids=prompt) for n, prompt in enumerate(prompts)]
    with torch.no_grad():
        for member, logp in zip(members, sequence_logprobs(other, groups).tolist(), strict=True):
            member.ref_logprob = logp
    accumulate_gradients(other, groups, beta=plain.BETA)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)  # pyright: ignore[reportArgumentType]


def test_trl_is_measured_at_its_fastest_setting_of_each_precision(step: dict[str, ModuleType]) -> None:
    cases, run = step["cases"], step["run"]
    seconds = {"float32, 8": 5.0, "float32, 16": 4.0, "autocast, 8": 3.0, "bf16 weights, 8": 2.0}
    kept = {"float32, 4, freed memory kept": 4.5, "bf16 weights, 8, freed memory kept": 1.0}
    rows = [
        cases.Job("main", "trl", name, 1, 2, stage="try").key() | {"steps": [{"whole": value}] * 2}
        for name, value in (seconds | kept).items()
    ]
    fastest = ["float32, 16", "bf16 weights, 8", "bf16 weights, 8, freed memory kept"]
    assert run.best_settings(cases.MAIN, rows) == fastest
    assert run.best_settings(cases.LONG, rows) == []


def test_a_step_is_measured_once(step: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, run = step["cases"], step["run"]
    made = []

    def measured(job: object) -> dict[str, object]:
        made.append(job)
        return job.key() | {"steps": [{"whole": 1.0}]}  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(run, "in_a_process", measured)
    jobs = [cases.Job("main", "gvpo", "bf16", 1, 5, repeat) for repeat in (0, 1)]
    for job in [*jobs, *jobs]:
        run.make(job, tmp_path)
    assert made == jobs
    assert [row["repeat"] for row in run.read_results(tmp_path)] == [0, 1]
