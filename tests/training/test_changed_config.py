"""Resuming under a changed config: one line names what has changed, and whether it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
from gvpo.training.config import GVPOConfig
from gvpo.training.loop import GVPOTrainer
from gvpo.training.same_run import FIXED, RESOLVED, UNSAID


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint after update 1 of 4."""
    options = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "save_total_limit": None, "reference": 2}
    run(tiny_model(), prompts(), first_token, **options)
    return tmp_path / "run" / "checkpoints" / "step-1"


def resumed(checkpoint: Path, data: Any = None, **options: Any) -> GVPOTrainer:
    config = settings(**{"reference": 2, **options})
    trainer = GVPOTrainer(tiny_model(), prompts() if data is None else data, first_token, config=config)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def refusal(checkpoint: Path, data: Any = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        resumed(checkpoint, data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_is_of_one_kind() -> None:
    assert set(FIXED) | UNSAID | RESOLVED <= GVPOConfig.model_fields.keys() | {"sources"}
    assert len(FIXED) + len(UNSAID) + len(RESOLVED) == len({*FIXED, *UNSAID, *RESOLVED})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"groups_per_update": 3}, "groups_per_update was 2, is 3"),
        ({"updates_per_rollout": 3}, "updates_per_rollout was 2, is 3"),
        ({"epochs_per_rollout": 2}, "epochs_per_rollout was 1, is 2"),
        ({"seed": 43}, "seed was 42, is 43"),
        ({"shuffle_dataset": False}, "shuffle_dataset was True, is False"),
        ({"objective": "rloo"}, "objective was 'gvpo', is 'rloo'"),
        ({"reference": "rollout"}, "reference was 2, is 'rollout'"),
        ({"reference": None}, "reference was 2, is 'rollout'"),  # what it comes to
    ],
)
def test_what_would_be_another_run(saved: Path, change: dict[str, Any], says: str) -> None:
    message = refusal(saved, **change)
    assert message.startswith(f"checkpoint {str(saved)!r}: {says}: that is another run")
    assert "allowed" not in message


def test_one_line_names_all_that_differs(saved: Path) -> None:
    message = refusal(saved, seed=43, updates_per_rollout=1, learning_rate=0.02, num_generations=4, save_steps=3)
    assert "seed was 42, is 43; updates_per_rollout was 2, is 1: that is another run" in message
    assert "(also changed, which is allowed: num_generations 3 -> 4; learning_rate 0.01 -> 0.02)" in message
    assert "save_steps" not in message


def test_another_dataset(saved: Path) -> None:
    assert "dataset rows was 6, is 9; dataset contents was" in refusal(saved, prompts(9))
    other = prompts()
    other[3]["target"] += 1
    message = refusal(saved, other)
    assert "dataset contents was" in message and "dataset rows" not in message
    resumed(saved, [dict(reversed(row.items())) for row in prompts()])  # the same, its columns in another order


def test_other_completions_or_rewards_are_another_dataset(tmp_path: Path) -> None:
    def made() -> Any:
        return offline_groups(4)

    options = {"output_dir": str(tmp_path), "save_steps": 2, "max_steps": 2}
    run(tiny_model(), made(), **options)
    for change in ("reward", "source", "text"):
        data = made()
        setattr(data[2].completions[0], change, 0.125 if change == "reward" else "other")
        trainer = GVPOTrainer(tiny_model(), data, config=settings(**options))
        with pytest.raises(UserError, match="dataset contents was"):
            trainer.train(resume_from_checkpoint=True)
    GVPOTrainer(tiny_model(), made(), config=settings(**options)).train(resume_from_checkpoint=True)


def test_another_prompt_column(tmp_path: Path) -> None:
    rows = [{**row, "prompt": "", "other": ""} for row in prompts()]
    run(tiny_model(), rows, first_token, output_dir=str(tmp_path), save_steps=2, max_steps=2)
    trainer = GVPOTrainer(tiny_model(), rows, first_token, config=settings(prompt_column="other"))
    with pytest.raises(UserError, match="prompt_column was 'prompt', is 'other'"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")


def test_what_has_changed_is_said_once(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    resumed(saved, disable_tqdm=False, learning_rate=0.02, temperature=0.5, logging_steps=7, run_name="mine")
    shown = capsys.readouterr().out
    assert shown.count("resumed with") == 1
    assert "resumed with temperature 1.0 -> 0.5; learning_rate 0.01 -> 0.02 (was -> is)" in shown
    resumed(saved, disable_tqdm=False)
    assert "resumed with" not in capsys.readouterr().out


def test_a_changed_learning_rate_and_length_hold_from_here_on(saved: Path) -> None:
    rates = [row["learning_rate"] for row in resumed(saved, learning_rate=0.03, max_steps=6).history]
    # Linear from 0.03 to 0 over 6 updates, from the second on; the first was made with 0.01.
    assert rates == pytest.approx([0.01, *(0.03 * (6 - n) / 6 for n in range(1, 6))], rel=1e-12)


def test_a_setting_that_only_one_of_the_two_has_is_no_change(saved: Path) -> None:
    trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=settings(reference=2))
    state = json.loads((saved / "state.json").read_text())["state"]
    assert trainer.state.run.check(state["fixed"], {**state["settings"], "model": "m"}) == []


def test_a_longer_run_equals_one_that_was_long_from_the_start_if_only_saving_changed(saved: Path) -> None:
    whole = run(tiny_model(), prompts(), first_token, reference=2)
    again = resumed(saved, save_steps=3, logging_steps=2, save_total_limit=1)
    assert same_weights(weights(again.model), weights(whole.model))
    assert again.history == whole.history == rows_of(saved.parent.parent / "metrics.jsonl")
