"""The reference policy: whose weights score it, when it is renewed, and that the policy's weights come back."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
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
from gvpo.models.scoring import Scorer
from gvpo.training import loop as loop_module
from gvpo.training import reference as reference_module
from gvpo.training.loop import GVPOTrainer
from gvpo.training.processes import OneProcess
from gvpo.training.reference import Reference, score_groups

CPU = torch.device("cpu")


def moved(model: torch.nn.Module, seed: int = 9) -> None:
    """Change every parameter by a random step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def started(kind: str | int, model: torch.nn.Module, **where: Any) -> Reference:
    reference = Reference(kind, Scorer(model), **where)
    reference.start()
    return reference


def refs(reference: Reference, groups: list[Group], token_budget: int | None = None) -> list[float]:
    how: dict[str, Any] = {"token_budget": token_budget, "share_prefix": True, "processes": OneProcess()}
    with reference.weights() as scorer:
        return score_groups(scorer, groups, **how).tolist()


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
    reference = started("initial", model)
    moved(model)
    after = weights(model)
    assert refs(reference, groups, token_budget) == pytest.approx(naive(start, groups), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(naive(start, groups), naive(model, groups), strict=True)) > 1
    assert same_weights(weights(model), after)


def test_rollout_scores_under_the_weights_of_now() -> None:
    model, groups = tiny_model(), offline_groups(3)
    reference = started("rollout", model)
    moved(model)
    assert refs(reference, groups) == pytest.approx(naive(model, groups), abs=1e-4)
    assert reference.state_dict() == {}


def test_an_integer_renews_every_n_rollouts() -> None:
    model, groups = tiny_model(), offline_groups(3)
    reference = started(2, model)
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
    reference = started(str(tmp_path / "other"), model)
    moved(model)
    assert refs(reference, groups) == pytest.approx(naive(other, groups), abs=1e-4)


def test_an_adapters_snapshot_is_the_adapter() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    reference = started("initial", model)
    assert len(reference.state_dict()) == 2 and all("lora" in name for name in reference.state_dict())


def test_the_weights_come_back_bit_for_bit_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    reference = started("initial", model)
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
    assert refs(started("initial", tiny_model()), []) == []


# In training


def initial(start: nn.Module, at_rollout: list[nn.Module], rollout: int) -> nn.Module:
    return start


def at_rollout(start: nn.Module, at_rollout: list[nn.Module], rollout: int) -> nn.Module:
    return at_rollout[rollout]


def every_second(start: nn.Module, at_rollout: list[nn.Module], rollout: int) -> nn.Module:
    return at_rollout[rollout - rollout % 2]


def adapted(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **options))


def models(training: str) -> tuple[nn.Module, nn.Module]:
    """A model to train, and another of the same shapes whose parameters are elsewhere."""
    if training == "full":
        return tiny_model(), tiny_model(7)
    zero = training == "adapter"
    return adapted(init_lora_weights=zero), adapted(5, init_lora_weights=False)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, nn.Module]]:
    """For each way to train: a checkpoint of another run, and the model that it holds."""
    made = {}
    for training in ("full", "adapter", "adapter from anywhere"):
        folder = tmp_path_factory.mktemp("other")
        model = models(training)[1]
        data, where = offline_groups(4, seed=3), str(folder)
        run(model, data, max_steps=1, save_steps=1, output_dir=where, reference="initial", learning_rate=0.1)
        made[training] = (str(folder / "checkpoints" / "step-1"), model)
    return made


@pytest.mark.parametrize("training", ["full", "adapter", "adapter from anywhere"])
@pytest.mark.parametrize(
    ("schedule", "storage"),
    [
        ("rollout", "cpu"),
        ("initial", "cpu"),
        ("initial", "disk"),
        (2, "cpu"),
        (2, "disk"),
        ("model", "cpu"),
        ("checkpoint", "cpu"),
        ("checkpoint", "disk"),
    ],
)
def test_every_schedule_in_training(
    tmp_path: Path,
    checkpoint_of: dict[str, tuple[str, nn.Module]],
    schedule: Any,
    storage: str,
    training: str,
) -> None:
    model, _ = models(training)
    start, under = copy.deepcopy(model), {"rollout": at_rollout, "initial": initial, 2: every_second}.get(schedule)
    reference = schedule
    if schedule == "model":
        other = tiny_model(7)
        other.save_pretrained(tmp_path)
        reference, under = str(tmp_path), lambda *args: other
    elif schedule == "checkpoint":
        reference, other = checkpoint_of[training]
        under = lambda *args: other  # noqa: E731
    assert under is not None
    rate = 0.05 if training == "full" else 0.5
    options = {"reference": reference, "reference_storage": storage, "max_steps": 6, "learning_rate": rate}
    trainer = GVPOTrainer(model, [*prompts(3), *offline_groups(3)], first_token, config=settings(**options))
    policies, seen = trained_under_watch(trainer)
    assert len(policies) == 3 and [rollout for rollout, _, _ in seen] == [0, 0, 1, 1, 2, 2]
    largest = 0.0
    for rollout, groups, policy in seen:
        expected = naive(under(start, policies, rollout), groups)
        assert ref_logprobs(groups) == pytest.approx(expected, abs=2e-4)
        largest = max(largest, *(abs(a - b) for a, b in zip(expected, naive(policy, groups), strict=True)))
    # Had the policy not moved away, any weights would have done.
    assert largest > 1


def trained_under_watch(trainer: GVPOTrainer) -> tuple[list[nn.Module], list[tuple[int, list[Group], nn.Module]]]:
    """Train. Returns the policy at the beginning of every rollout, and of every update: rollout, groups, policy."""
    policies: list[nn.Module] = []
    seen: list[tuple[int, list[Group], nn.Module]] = []
    draw, gradients = trainer._draw, loop_module.group_gradients

    def drawing(*args: Any) -> Any:
        policies.append(copy.deepcopy(trainer.model))
        return draw(*args)

    def watching(scorer: Any, groups: list[Group], **options: Any) -> Any:
        seen.append((len(policies) - 1, copy.deepcopy(groups), copy.deepcopy(trainer.model)))
        return gradients(scorer, groups, **options)

    trainer._draw = drawing  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "group_gradients", watching)
        trainer.train()
    return policies, seen


@pytest.mark.parametrize("objective", ["gvpo", "grpo"])
@pytest.mark.parametrize("training", ["full", "adapter from anywhere"])
@pytest.mark.parametrize("schedule", ["initial", 2, "checkpoint"])
def test_where_a_snapshot_lives_changes_no_bit(
    tmp_path: Path,
    checkpoint_of: dict[str, tuple[str, nn.Module]],
    schedule: Any,
    training: str,
    objective: str,
) -> None:
    made = []
    for storage in ("cpu", "disk"):
        reference = checkpoint_of[training][0] if schedule == "checkpoint" else schedule
        where = {"reference_storage": storage, "output_dir": str(tmp_path / storage), "save_steps": 3}
        model = models(training)[0]
        history = run(model, prompts(), first_token, reference=reference, objective=objective, **where).history
        snapshot = load_file(tmp_path / storage / "checkpoints" / "step-3" / "reference.safetensors")
        made.append((history, weights(model), snapshot))
    assert made[0][0] == made[1][0]
    assert same_weights(made[0][1], made[1][1]) and same_weights(made[0][2], made[1][2])


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
    def unequal(completion_ids: Any, **columns: Any) -> list[float]:
        """No group of equal rewards: those are not even read."""
        return [reward + n / 100 for n, reward in enumerate(first_token(completion_ids))]

    results = []
    for skip in (True, False):
        model = tiny_model(hidden_size=64)
        trainer = GVPOTrainer(model, prompts(), unequal, config=settings(updates_per_rollout=1, max_steps=5))
        assert trainer.own_reference
        trainer.own_reference = skip
        trainer.train()
        results.append((weights(model), trainer.history))
    for one, other in zip(results[0][1], results[1][1], strict=True):
        # Summed over all groups at once, or batch by batch.
        assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-12)
        assert one == other
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


# A checkpoint as the reference


@pytest.fixture
def checkpoint(tmp_path: Path, checkpoint_of: dict[str, tuple[str, nn.Module]]) -> Path:
    """A checkpoint of a full run, to be broken."""
    return Path(shutil.copytree(checkpoint_of["full"][0], tmp_path / "step-1"))


def refusal(reference: Path, model: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        run(tiny_model() if model is None else model, prompts(), first_token, reference=str(reference))
    assert "\n" not in str(caught.value) and str(reference) in str(caught.value)
    return str(caught.value)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_before_weights_load(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loop_module, "load_model", lambda name: pytest.fail("weights were loaded"))
    flip(checkpoint / "parameters.safetensors")
    assert "damaged" in refusal(checkpoint, tmp_path / "model")
    (checkpoint / "parameters.safetensors").unlink()
    assert "parameters.safetensors" in refusal(checkpoint, tmp_path / "model")
    (checkpoint / "state.json").write_text("{")
    assert "state.json is damaged" in refusal(checkpoint, tmp_path / "model")


def test_a_checkpoint_without_its_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    assert "no state.json" in refusal(checkpoint)


def test_the_parameters_alone_count(checkpoint: Path) -> None:
    flip(checkpoint / "optimizer.safetensors")
    run(tiny_model(), prompts(), first_token, reference=str(checkpoint), max_steps=1)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny_model(hidden_size=32), r"lm_head.weight is \(16, 16\) there and \(16, 32\) here"),
        (lambda: tiny_model(num_hidden_layers=2), r"layers.1.\S+ is absent there and \(16,?.*\) here"),
        (adapted, r"is \(\d+.*\) there and absent here|is absent there and \(.*\) here"),
    ],
)
def test_a_checkpoint_of_another_model(checkpoint: Path, model: Any, says: str) -> None:
    message = refusal(checkpoint, model())
    assert "not this model's" in message and re.search(says, message)


def test_a_run_goes_on_without_reading_what_it_was_anchored_to(checkpoint: Path, tmp_path: Path) -> None:
    options = {"reference": str(checkpoint), "max_steps": 6, "save_steps": 3}
    whole = run(tiny_model(), prompts(), first_token, output_dir=str(tmp_path / "run"), **options)
    again = GVPOTrainer(tiny_model(3), prompts(), first_token, config=settings(**options))
    # As if the folder had been written anew between the check and the start.
    tensors = {name: value + 1 for name, value in load_file(checkpoint / "parameters.safetensors").items()}
    save_file(tensors, checkpoint / "parameters.safetensors")
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / "step-3")
    assert again.history == whole.history and same_weights(weights(again.model), weights(whole.model))
