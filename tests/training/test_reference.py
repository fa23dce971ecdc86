"""The reference policy: whose weights score it, when it is renewed, and that the policy's weights come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_helpers import (
    first_token,
    naive_logprob,
    offline_groups,
    prompts,
    run,
    same_weights,
    settings,
    tiny_model,
    weights,
)

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.scoring import Scorer, sequence_logprobs
from gvpo.training import reference as reference_module
from gvpo.training.loop import GVPOTrainer
from gvpo.training.processes import OneProcess
from gvpo.training.reference import Reference

CPU = torch.device("cpu")


def moved(model: torch.nn.Module, seed: int = 9) -> None:
    """Change every parameter by a random step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def refs(reference: Reference, groups: list[Group], token_budget: int | None = None) -> list[float]:
    return reference.logprobs(groups, token_budget, True, OneProcess()).tolist()


def naive(model: torch.nn.Module, groups: list[Group]) -> list[float]:
    return [naive_logprob(model, g.prompt_ids or [], c.token_ids or []) for g in groups for c in g.completions]


def recorded(trainer: GVPOTrainer) -> list[list[Group]]:
    """Train, and return every rollout's groups as they are after the reference has scored them."""
    rollouts: list[list[Group]] = []
    refer = trainer._refer

    def spy(groups: list[Group]) -> None:
        refer(groups)
        rollouts.append(copy.deepcopy(groups))

    trainer._refer = spy  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    return rollouts


def ref_logprobs(groups: list[Group]) -> list[float]:
    values = [c.ref_logprob for group in groups for c in group.completions]
    assert all(value is not None for value in values)
    return values  # pyright: ignore[reportReturnType]


# Which weights


@pytest.mark.parametrize("token_budget", [None, 12])
def test_initial_scores_under_the_weights_at_the_start(token_budget: int | None) -> None:
    model, groups = tiny_model(), offline_groups(5)
    start = copy.deepcopy(model)
    reference = Reference("initial", Scorer(model))
    moved(model)
    after = weights(model)
    assert refs(reference, groups, token_budget) == pytest.approx(naive(start, groups), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(naive(start, groups), naive(model, groups), strict=True)) > 1
    assert same_weights(weights(model), after)


def test_rollout_scores_under_the_weights_of_now() -> None:
    model, groups = tiny_model(), offline_groups(3)
    reference = Reference("rollout", Scorer(model))
    moved(model)
    assert refs(reference, groups) == pytest.approx(naive(model, groups), abs=1e-4)
    assert reference.state_dict() == {}


def test_an_integer_renews_every_n_rollouts() -> None:
    model, groups = tiny_model(), offline_groups(3)
    reference = Reference(2, Scorer(model))
    scored = []
    held = None
    for rollout in range(5):
        moved(model, seed=rollout)
        if rollout % 2 == 0:
            held = copy.deepcopy(model)
        assert held is not None
        reference.before_rollout(rollout)
        scored.append(refs(reference, groups))
        assert scored[-1] == pytest.approx(naive(held, groups), abs=1e-3)
    assert scored[0] == scored[1] != scored[2] == scored[3] != scored[4]


def test_a_path_is_another_model(tmp_path: Path) -> None:
    other, model, groups = tiny_model(7), tiny_model(), offline_groups(3)
    other.save_pretrained(tmp_path / "other")
    reference = Reference(str(tmp_path / "other"), Scorer(model))
    moved(model)
    assert refs(reference, groups) == pytest.approx(naive(other, groups), abs=1e-4)


def test_an_adapters_snapshot_is_the_adapter() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    reference = Reference("initial", Scorer(model))
    assert len(reference.state_dict()) == 2 and all("lora" in name for name in reference.state_dict())


def test_the_weights_come_back_bit_for_bit_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    reference = Reference("initial", Scorer(model))
    start = reference.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    moved(model)
    before, groups = weights(model), offline_groups(2)

    def failing(*args: Any, **settings: Any) -> None:
        assert not same_weights(weights(model), before)
        raise KeyboardInterrupt

    monkeypatch.setattr(reference_module, "score_plan", failing)
    with pytest.raises(KeyboardInterrupt):
        refs(reference, groups)
    assert same_weights(weights(model), before)
    assert same_weights(reference.state_dict(), start)


def test_no_groups_no_log_probs() -> None:
    assert refs(Reference("initial", Scorer(tiny_model())), []) == []


# In training


def test_initial_in_training() -> None:
    model = tiny_model()
    start = copy.deepcopy(model)
    trainer = GVPOTrainer(model, prompts(), first_token, config=settings(reference="initial", max_steps=6))
    rollouts = recorded(trainer)
    assert len(rollouts) == 3
    for groups in rollouts:
        assert ref_logprobs(groups) == pytest.approx(sequence_logprobs(start, groups).tolist(), abs=1e-4)
    assert trainer.history[-1]["log_ratio/max"] > 0.01


def test_a_path_in_training(tmp_path: Path) -> None:
    other = tiny_model(7)
    other.save_pretrained(tmp_path)
    config = settings(reference=str(tmp_path), max_steps=4)
    groups = recorded(GVPOTrainer(tiny_model(), offline_groups(), config=config))[-1]
    assert ref_logprobs(groups) == pytest.approx(naive(other, groups), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"token_budget": 12}, {"share_prefix": False}, {"bf16": True}])
def test_the_first_update_of_every_rollout_has_log_ratios_of_exactly_zero(options: dict[str, Any]) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    shape = {"groups_per_update": 3, "updates_per_rollout": 3, "epochs_per_rollout": 2, "max_completion_length": 8}
    history = run(model, prompts(40), first_token, max_steps=18, num_generations=4, **shape, **options).history
    first = [row["log_ratio/max"] for row in history[::6]]
    assert first == [0.0, 0.0, 0.0]
    assert all(row["log_ratio/max"] > 0 for n, row in enumerate(history) if n % 6)


def test_untouched_weights_have_log_ratios_of_exactly_zero_in_every_update() -> None:
    model = tiny_model(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    for reference in ("initial", 2):
        options = {"reference": reference, "groups_per_update": 3, "updates_per_rollout": 3, "token_budget": 64}
        history = run(model, prompts(40), first_token, learning_rate=0, max_steps=9, **options).history
        assert [row["log_ratio/max"] for row in history] == [0.0] * 9


def test_a_reference_of_the_same_weights_is_scored_in_the_policys_precision(tmp_path: Path) -> None:
    model = tiny_model(hidden_size=64)
    model.save_pretrained(tmp_path)
    history = run(model, offline_groups(), reference=str(tmp_path), bf16=True, max_steps=1).history
    assert history[0]["log_ratio/max"] == 0


def test_an_integer_in_training() -> None:
    history = run(tiny_model(), prompts(), first_token, reference=2, updates_per_rollout=1, max_steps=6).history
    zero = [row["log_ratio/max"] == 0 for row in history]
    assert zero == [True, False, True, False, True, False]


def test_skipping_the_reference_changes_no_bit() -> None:
    results = []
    for skip in (True, False):
        model = tiny_model(hidden_size=64)
        trainer = GVPOTrainer(model, prompts(), first_token, config=settings(updates_per_rollout=1, max_steps=5))
        assert trainer.own_reference
        trainer.own_reference = skip
        trainer.train()
        results.append((weights(model), trainer.history))
    assert results[0][1] == results[1][1]
    assert same_weights(results[0][0], results[1][0])


@pytest.mark.parametrize("options", [{"updates_per_rollout": 2}, {"epochs_per_rollout": 2}, {"reference": "initial"}])
def test_the_reference_is_scored_where_log_ratios_can_differ(options: dict[str, Any]) -> None:
    config = settings(**{"updates_per_rollout": 1, **options})
    assert not GVPOTrainer(tiny_model(), prompts(), first_token, config=config).own_reference


def test_a_ref_logprob_in_the_data_is_never_used() -> None:
    groups = offline_groups(4)
    plain = run(tiny_model(), copy.deepcopy(groups), max_steps=4).history
    for group in groups:
        for completion in group.completions:
            completion.ref_logprob = -1000.0
    assert run(tiny_model(), groups, max_steps=4).history == plain


# Which one


def kind(data: Any, **options: Any) -> str | int:
    return GVPOTrainer(tiny_model(), data, first_token, config=settings(**options)).reference.kind


def test_the_default_is_rollout_when_sampling_and_initial_offline() -> None:
    assert kind(prompts()) == "rollout"
    assert kind(offline_groups()) == "initial"
    row = {"prompt_ids": [1], "completions": [{"token_ids": [1]}, {"token_ids": [2]}]}
    assert kind([row, *prompts(1)]) == "rollout"


@pytest.mark.parametrize("reference", ["rollout", 1, 5])
def test_offline_data_needs_an_anchor(reference: str | int) -> None:
    with pytest.raises(UserError, match="no anchor") as caught:
        kind(offline_groups(), reference=reference)
    assert "allow_unanchored" in str(caught.value) and "'initial'" in str(caught.value)
    assert kind(offline_groups(), reference=reference, allow_unanchored=True) == reference
    assert kind(prompts(), reference=reference) == reference


def test_a_missing_reference_is_refused_before_weights_load() -> None:
    with pytest.raises(UserError, match="no such folder"):
        GVPOTrainer("./no-model", prompts(), first_token, config=settings(reference="./no-reference"))
    with pytest.raises(UserError, match="no-reference': no such folder"):
        GVPOTrainer(tiny_model(), prompts(), first_token, config=settings(reference="./no-reference"))
