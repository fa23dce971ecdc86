"""Two processes make the run that one makes: the same draws, numbers and weights, whoever has how much to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_worker
import pytest
import torch
from interruptions import differences
from safetensors.torch import load_file
from training_helpers import first_token, prompts, rows_of, same_weights, settings, tiny_model, weights

from gvpo.group_files import read_groups
from gvpo.training.checkpoint import _generators, _read_state
from gvpo.training.loop import GVPOTrainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have left their scenarios in."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}
    worker = [str(HERE / "process_worker.py"), str(folder)]
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _path() -> str:
    return os.pathsep.join([str(HERE), *sys.path])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Every scenario's weights and story, from one process."""
    folder = tmp_path_factory.mktemp("one")
    made = {}
    for name, scenario in process_worker.SCENARIOS.items():
        trainer = scenario(folder)
        told = process_worker.story(trainer)
        made[name] = weights(trainer.model), told
    return made


@pytest.mark.parametrize("name", process_worker.SCENARIOS)
def test_two_processes_make_the_run_of_one(name: str, one: dict[str, Any], two: Path) -> None:
    expected, alone = one[name]
    together = json.loads((two / f"{name}.json").read_text())
    assert (alone["world_size"], together["world_size"]) == (1, 2)
    assert together["in_step"]
    assert together["rollouts"] == json.loads(json.dumps(alone["rollouts"]))
    assert len(together["history"]) == len(alone["history"])
    # In single precision a log-ratio, a difference of log-probs, keeps fewer digits than they do.
    relative, absolute = (1e-3, 1e-5) if name == "single_precision" else (1e-5, 1e-7)
    for row, other in zip(together["history"], alone["history"], strict=True):
        assert row == pytest.approx(other, rel=relative, abs=absolute)
    made = load_file(two / f"{name}.safetensors")
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, rtol=1e-5, atol=1e-7)
    assert not same_weights(expected, weights(tiny_model().to(next(iter(expected.values())).dtype)))


def test_the_scenarios_are_what_they_say(one: dict[str, Any], two: Path) -> None:
    told = {name: json.loads((two / f"{name}.json").read_text()) for name in process_worker.SCENARIOS}
    assert max(row.get("log_ratio/max", 0) for row in told["stale"]["history"]) > 5
    assert max(row["members/dropped"] for row in told["stale"]["history"]) > 1
    fewer = [first - second for first, second in zip(*told["stale"]["batches"], strict=True)]
    assert min(fewer) < 0 < max(fewer)
    assert min(map(min, told["split_groups"]["batches"])) > 1
    assert all(0 in counts for counts in told["idle"]["batches"])
    empty = [row for row in told["idle"]["history"] if row["loss"] == 0 and "reward" not in row]
    assert empty and all(row["grad_norm"] == 0 for row in empty)
    assert any("eval/reward" in row for row in told["sampled"]["history"])
    assert max(row.get("log_ratio/max", 0) for row in told["adapter"]["history"]) > 1
    # Both updates of a rollout tell of it.
    assert min(row["rewards/failed/crash"] for row in told["elsewhere"]["history"]) > 1


def test_a_wrapped_scorers_gradient_is_that_of_all_groups(two: Path) -> None:
    expected = process_worker.wrapped_gradient(None)
    for rank in (0, 1):
        made = load_file(two / f"gradient-{rank}.safetensors")["gradient"]
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)


def test_the_main_process_alone_writes_and_any_number_goes_on(one: dict[str, Any], two: Path) -> None:
    folder = two / "run"
    together = json.loads((two / "saving.json").read_text())
    assert rows_of(folder / "metrics.jsonl") == together["history"]
    assert len(rows_of(folder / "timings.jsonl")) == 6
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-3", "step-6"]
    for number, groups in enumerate(together["rollouts"], start=1):
        written = list(read_groups(folder / "completions" / f"rollout-{number:06d}.jsonl"))
        assert [[group.prompt_ids, [c.token_ids for c in group.completions]] for group in written] == groups
    config = settings(groups_per_update=3, max_steps=6, reference="initial")
    again = GVPOTrainer(tiny_model(8).double(), prompts(7), first_token, config=config)
    again.train(resume_from_checkpoint=folder / "checkpoints" / "step-3")
    for key, value in one["saving"][0].items():
        torch.testing.assert_close(weights(again.model)[key], value, rtol=1e-5, atol=1e-7)
    assert same_weights(load_file(two / "going_on.safetensors"), load_file(two / "saving.safetensors"))


@pytest.mark.parametrize("name", ["two-killed", "two-stopped"])
def test_two_processes_go_on_bit_for_bit(name: str, two: Path) -> None:
    assert differences(two / name, two / "two-whole") == []


def test_two_processes_agree_to_stop_after_the_next_update(two: Path) -> None:
    assert json.loads((two / "stopped.json").read_text()) == {"updates": [3, 3], "codes": [143, 143]}


def test_each_process_takes_its_own_generators(two: Path) -> None:
    folder = two / "two-whole" / "checkpoints" / "step-3"
    states, tensors = _read_state(folder)["generators"], load_file(folder / "rng.safetensors")
    assert len(states) == 2 and states[0] != states[1]
    for process in range(5):
        taken = _generators(states, tensors, process)
        assert taken.python == states[process % 2]["python"]
        assert torch.equal(taken.torch["torch"], tensors[f"{process % 2}/torch"])
    assert not torch.equal(tensors["0/torch"], tensors["1/torch"])
