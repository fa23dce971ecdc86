"""Checkpoints: a run that stops and goes on is the run that never stopped, to the bit; broken ones are refused."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from training_helpers import (
    first_token,
    offline_groups,
    prompts,
    rows_of,
    run,
    same_weights,
    settings,
    tiny_model,
    weights,
)

from gvpo.errors import UserError
from gvpo.training import checkpoint as checkpoint_module
from gvpo.training.loop import GVPOTrainer
from gvpo.training.random_state import RandomState


def logging_reward(completion_ids: list[list[int]], log_metric: Any, trainer_state: Any, **kwargs: Any) -> list[Any]:
    log_metric("step", trainer_state.global_step)
    return [
        None if ids[0] == 3 else reward for ids, reward in zip(completion_ids, first_token(completion_ids), strict=True)
    ]


def optimizer_state(trainer: GVPOTrainer) -> dict[str, Tensor]:
    names = {p: name for name, p in trainer.model.named_parameters()}
    state = trainer.optimizer.optimizer.state
    return {f"{names[p]}/{key}": value for p, values in state.items() for key, value in values.items()}


def trainer_in(folder: Path, data: Any, model: Any = None, **options: Any) -> GVPOTrainer:
    config = settings(output_dir=str(folder), **options)
    model = tiny_model() if model is None else model
    return GVPOTrainer(model, data, logging_reward, config=config, eval_dataset=prompts(2))


def crashed(folder: Path, data: Any, stop_after: int, resume: Any = None, **options: Any) -> None:
    """A run that dies when update `stop_after` + 1 is made, before anything of it is written."""
    trainer = trainer_in(folder, data, **options)
    update = trainer._update

    def dying() -> dict[str, Any]:
        row = update()
        if row["update"] > stop_after:
            raise KeyboardInterrupt
        return row

    trainer._update = dying  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("options", "offline"),
    [
        ({"updates_per_rollout": 1}, False),
        ({"updates_per_rollout": 2}, False),  # the checkpoint falls within a rollout
        ({"updates_per_rollout": 3, "epochs_per_rollout": 2}, False),
        ({"updates_per_rollout": 2, "reference": "initial"}, False),
        ({"updates_per_rollout": 2, "reference": 2, "warmup_steps": 4, "lr_scheduler_type": "cosine"}, False),
        ({"updates_per_rollout": 1, "reference": 3, "epochs_per_rollout": 2}, False),
        ({"updates_per_rollout": 2, "weight_decay": 0.1, "token_budget": 16}, True),
    ],
)
def test_going_on_is_never_having_stopped(tmp_path: Path, options: dict[str, Any], offline: bool) -> None:
    options = {"max_steps": 9, "save_steps": 5, "eval_steps": 2, "eval_on_start": True, **options}
    data = offline_groups(7) if offline else prompts(7)
    whole = trainer_in(tmp_path / "whole", data, **options)
    whole.train()

    crashed(tmp_path / "parts", data, stop_after=7, **options)
    torch.manual_seed(99)
    again = trainer_in(tmp_path / "parts", data, model=tiny_model(5), **options)
    again.train(resume_from_checkpoint=True)

    assert same_weights(weights(again.model), weights(whole.model))
    assert same_weights(optimizer_state(again), optimizer_state(whole)) and optimizer_state(again)
    for name in ("metrics.jsonl", *(f"completions/{file.name}" for file in (tmp_path / "whole/completions").iterdir())):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again.history == whole.history == rows_of(tmp_path / "parts" / "metrics.jsonl")
    assert [row["update"] for row in rows_of(tmp_path / "parts" / "timings.jsonl")] == list(range(10))


def test_every_checkpoint_gives_the_same_end(tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_steps": 1, "updates_per_rollout": 2, "epochs_per_rollout": 2}
    whole = trainer_in(tmp_path / "run", prompts(7), **options)
    whole.train()
    for step in range(1, 8):
        folder = tmp_path / f"from-{step}"
        again = trainer_in(folder, prompts(7), **options)
        again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / f"step-{step}")
        assert same_weights(weights(again.model), weights(whole.model))
        # In a folder of its own, too, this run has all rows.
        assert again.history == whole.history
        assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("n", [3, 4])
def test_a_finished_run_can_be_made_longer(tmp_path: Path, n: int) -> None:
    options = {"save_steps": n, "lr_scheduler_type": "constant"}
    whole = trainer_in(tmp_path / "whole", prompts(7), max_steps=7, **options)
    whole.train()
    trainer_in(tmp_path / "parts", prompts(7), max_steps=n, **options).train()
    again = trainer_in(tmp_path / "parts", prompts(7), max_steps=7, **options)
    again.train(resume_from_checkpoint=tmp_path / "parts" / "checkpoints" / f"step-{n}")
    assert same_weights(weights(again.model), weights(whole.model))
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


def test_an_adapters_checkpoint_holds_the_adapter(tmp_path: Path) -> None:
    def adapted(seed: int = 0) -> Any:
        return get_peft_model(tiny_model(seed), LoraConfig(r=2, target_modules=["q_proj"]))

    options = {"max_steps": 4, "save_steps": 2, "reference": "initial"}
    whole = trainer_in(tmp_path / "run", prompts(7), model=adapted(), **options)
    whole.train()
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    assert (folder / "parameters.safetensors").stat().st_size < 2000
    again = trainer_in(tmp_path / "again", prompts(7), model=adapted(), **options)
    again.train(resume_from_checkpoint=str(folder))
    assert same_weights(weights(again.model), weights(whole.model))


def test_random_states_come_back() -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.random()), float(np.random.normal()), float(torch.rand(()))]

    np.random.normal()  # leaves its twin behind, for the next call
    state = RandomState.now()
    expected = drawn()
    drawn()
    python, numpy = json.loads(json.dumps([state.python, state.numpy]))
    RandomState(python, numpy, state.torch).restore()
    assert drawn() == expected


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path), max_steps=12, save_steps=2, save_total_limit=2)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-12"]


def test_a_checkpoint_is_tensors_and_json(tmp_path: Path) -> None:
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path), max_steps=1, save_steps=1, reference="initial")
    files = {file.name for file in (tmp_path / "checkpoints" / "step-1").iterdir()}
    tensors = {f"{name}.safetensors" for name in ("parameters", "optimizer", "reference", "rng")}
    assert files == tensors | {"groups.jsonl", "metrics.jsonl", "state.json"}


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, prompts(), max_steps=2, save_steps=2)
    summary = first.train()
    again = trainer_in(tmp_path, prompts(), model=tiny_model(3), max_steps=2, save_steps=2)
    again_summary = again.train(resume_from_checkpoint=True)
    assert {**summary, "seconds": 0} == {**again_summary, "seconds": 0}
    assert again.history == first.history


def test_an_older_checkpoint_gives_up_what_came_after_it(tmp_path: Path) -> None:
    options = {"max_steps": 8, "updates_per_rollout": 1, "eval_steps": 2, "save_total_limit": None}
    trainer_in(tmp_path, prompts(7), save_steps=2, **options).train()
    mine = tmp_path / "completions" / "rollout-000007.scored.jsonl"  # a file of the user's
    mine.write_text("mine")
    crashed(tmp_path, prompts(7), 3, tmp_path / "checkpoints" / "step-2", save_steps=3, **options)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert mine.read_text() == "mine"
    files = sorted(entry.name for entry in (tmp_path / "completions").iterdir() if entry != mine)
    assert files == ["eval-000002.jsonl", *(f"rollout-{n:06d}.jsonl" for n in (1, 2, 3, 4))]
    assert [row["update"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    again = trainer_in(tmp_path, prompts(7), save_steps=3, **options)
    again.train(resume_from_checkpoint=True)
    assert [row["update"] for row in again.history] == list(range(1, 9))


# Refusals


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint after update 1 of a run with a snapshot, within a rollout."""
    run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, reference=2)
    return tmp_path / "run" / "checkpoints" / "step-1"


def resumed(checkpoint: Path | bool, model: Any = None, **options: Any) -> GVPOTrainer:
    config = settings(**{"reference": 2, **options})
    trainer = GVPOTrainer(tiny_model() if model is None else model, prompts(), first_token, config=config)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def refusal(checkpoint: Path | bool, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        resumed(checkpoint, *args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_checkpoint_is_taken(saved: Path) -> None:
    assert [row["update"] for row in resumed(saved).history] == [1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 2}])
def test_another_models_checkpoint(saved: Path, changes: dict[str, int]) -> None:
    model = tiny_model(**changes)
    before = weights(model)
    assert "not this model's" in refusal(saved, model)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("name", ["parameters", "optimizer", "reference", "rng"])
@pytest.mark.parametrize("kept", [0, 7, 100])
def test_a_truncated_file(saved: Path, name: str, kept: int) -> None:
    file = saved / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    model = tiny_model()
    before = weights(model)
    message = refusal(saved, model)
    assert str(file) in message and "older" in message
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "rng.safetensors", "groups.jsonl"])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert name in refusal(saved)


def test_a_flipped_bit_in_any_file(saved: Path) -> None:
    files = [file for file in saved.rglob("*") if file.is_file()]
    assert len(files) == 7
    for file in files:
        data = file.read_bytes()
        for place in (0, len(data) // 3, len(data) - 2):
            for bit in (1, 64):
                flipped = bytearray(data)
                flipped[place] ^= bit
                file.write_bytes(flipped)
                message = refusal(saved)
                assert str(saved) in message and ("damaged" in message or "another version" in message)
        file.write_bytes(data)
    assert len(resumed(saved).history) == 4


def test_a_flipped_bit_anywhere_in_the_state(saved: Path) -> None:
    """Every byte of state.json counts, but for those that JSON does not read: one in a hundred is tried."""
    file = saved / "state.json"
    data = file.read_bytes()
    for place in [place for place in range(0, len(data) - 1, 101) if not chr(data[place]).isspace()]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        with pytest.raises(UserError):
            checkpoint_module._read_state(saved)


def test_a_missing_snapshot(saved: Path) -> None:
    (saved / "reference.safetensors").unlink()
    assert "reference" in refusal(saved)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"format": 0}'])
def test_a_broken_state(saved: Path, text: str | None) -> None:
    (saved / "state.json").unlink()
    if text is not None:
        (saved / "state.json").write_text(text)
    assert str(saved) in refusal(saved)


def test_groups_that_are_cut_short(saved: Path) -> None:
    lines = (saved / "groups.jsonl").read_text().splitlines(keepends=True)
    (saved / "groups.jsonl").write_text("".join(lines[:-1]))
    assert "groups.jsonl" in refusal(saved)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "save_steps" in refusal(True, output_dir=str(tmp_path / "none"))
    assert "save_steps" in refusal(True)
    assert "state.json" in refusal(tmp_path / "none")


def test_a_checkpoint_of_another_run_does_not_open_a_runs_folder(tmp_path: Path, saved: Path) -> None:
    other = tmp_path / "other"
    run(tiny_model(), prompts(), first_token, output_dir=str(other), max_steps=3)
    before = (other / "metrics.jsonl").read_bytes()
    assert "already holds a run" in refusal(saved, output_dir=str(other))
    assert "already holds a run" in refusal(saved, output_dir=str(tmp_path))  # above the run's own folder
    assert (other / "metrics.jsonl").read_bytes() == before


def test_a_failed_resume_leaves_the_run_as_it_was(saved: Path) -> None:
    folder = saved.parent.parent
    (saved / "state.json").write_text("{")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    refusal(True, output_dir=str(folder))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


# Interrupted saves


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
)
@pytest.mark.parametrize("file", ["parameters", "optimizer", "rng"])
def test_an_interrupted_save_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, file: str
) -> None:
    real = checkpoint_module.save_file

    def failing(tensors: dict[str, Tensor], path: Path) -> None:
        if "step-4" in str(path) and path.stem == file:
            path.write_bytes(b"half")
            raise error
        real(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", failing)
    options = {"output_dir": str(tmp_path), "save_steps": 2, "max_steps": 6, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError) as caught:
        run(tiny_model(), prompts(), first_token, **options)
    if isinstance(caught.value, UserError):
        assert "no space left" in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-2"]

    monkeypatch.setattr(checkpoint_module, "save_file", real)
    again = GVPOTrainer(tiny_model(3), prompts(), first_token, config=settings(**options))
    again.train(resume_from_checkpoint=True)
    never_stopped = run(tiny_model(), prompts(), first_token, **{**options, "output_dir": None})
    assert same_weights(weights(again.model), weights(never_stopped.model))


def test_a_checkpoint_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert len(resumed(tmp_path / "elsewhere").history) == 4
