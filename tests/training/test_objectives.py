"""Every objective through the real trainer and scorer: stale updates, any split, resumed runs, and where they lead."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from training_helpers import (
    END,
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

import exact
from gvpo.errors import UserError
from gvpo.group_files import read_groups, write_groups
from gvpo.groups import Completion, Group
from gvpo.objective import OBJECTIVES
from gvpo.training import config as config_module
from gvpo.training import loop as loop_module
from gvpo.training.config import ConfigError, GVPOConfig
from gvpo.training.loop import GVPOTrainer
from gvpo.training.reference import score_groups
from gvpo.training.update import accumulate_gradients

TOKENS = [name for name, one in OBJECTIVES.items() if one.per_token]
every = pytest.mark.parametrize("name", OBJECTIVES)
on_tokens = pytest.mark.parametrize("name", TOKENS)


def token_logprobs(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """log pi of every token of every completion, float64 after the logits: one plain forward a sequence."""
    rows = []
    for group in groups:
        for one in group.completions:
            prompt, ids = group.prompt_ids or [], one.token_ids or []
            logps_LV = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            rows.append(logps_LV[torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), torch.tensor(ids).long()])
    return rows


def plain_loss(model: nn.Module, groups: Sequence[Group], name: str, beta: float, **options: Any) -> Tensor:
    """The objective of the members with a reward, on log-probs scored one sequence at a time."""
    members = [(number, one) for number, group in enumerate(groups) for one in group.completions]
    scored = token_logprobs(model, groups)
    kept = [place for place, (_, one) in enumerate(members) if one.reward is not None]
    width = max(len(scored[place]) for place in kept)

    def matrix(values: Callable[[int], Any], dtype: torch.dtype = torch.float64) -> Tensor:
        rows = [torch.as_tensor(values(place), dtype=dtype) for place in kept]
        return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])

    mask_NT = matrix(lambda place: members[place][1].loss_mask or [True] * len(scored[place]), torch.bool)
    logps_NT, refs_NT = matrix(scored.__getitem__), matrix(lambda place: members[place][1].ref_token_logprobs or [])
    rewards_N = torch.tensor([members[place][1].reward for place in kept], dtype=torch.float64)
    ids_N = torch.tensor([members[place][0] for place in kept])
    if name in TOKENS:
        old_NT = matrix(lambda place: members[place][1].old_token_logprobs or [])
        return OBJECTIVES[name].loss(logps_NT, old_NT, refs_NT, mask_NT, rewards_N, ids_N, beta=beta, **options)
    refs_N = torch.tensor([members[place][1].ref_logprob for place in kept], dtype=torch.float64)
    return OBJECTIVES[name].loss((logps_NT * mask_NT).sum(1), refs_N, rewards_N, ids_N, beta=beta, **options)


def stale_groups(drift: float = 3.0) -> list[Group]:
    """Groups of 3, 1, 4 and 3 with log-probs up to `drift` nats a token from the policy's, each its own way."""
    draw = random.Random(4)
    lengths = [(3, [5, 1, 9]), (7, [2]), (1, [4, 12, 0, 4]), (5, [6, 3, 2])]
    groups = [
        Group(
            None,
            [Completion(token_ids=[draw.randrange(END) for _ in range(n)], reward=draw.random()) for n in completions],
            prompt_ids=[draw.randrange(END) for _ in range(prompt)],
        )
        for prompt, completions in lengths
    ]
    groups[0].completions[2].loss_mask = [True, True, False, False, False, True, True, False, True]
    groups[3].completions[1].reward = None
    members = [one for group in groups for one in group.completions]
    with torch.no_grad():
        scored = token_logprobs(tiny_model(), groups)
    for one, logps in zip(members, scored, strict=True):
        seen = one.loss_mask or [True] * len(logps)
        for name in ("ref_token_logprobs", "old_token_logprobs"):
            moved = [(float(logp) + draw.uniform(-drift, drift)) * s for logp, s in zip(logps, seen, strict=True)]
            setattr(one, name, moved)
        one.ref_logprob = math.fsum(one.ref_token_logprobs or [])
    return groups


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def plain_gradient(groups: Sequence[Group], name: str, beta: float) -> Tensor:
    model = tiny_model()
    plain_loss(model, groups, name, beta).backward()
    return gradient(model)


def apart(ours: Tensor, plain: Tensor) -> float:
    """Relative error."""
    return float((ours - plain).norm() / plain.norm())


class TestExactGradient:
    LONGEST = 13  # tokens of the longest prompt with completion

    @every
    @pytest.mark.parametrize("share_prefix", [True, False])
    def test_every_split(self, name: str, share_prefix: bool) -> None:
        groups, beta = stale_groups(), 0.1
        plain = plain_gradient(groups, name, beta)
        for budget in (None, 4 * self.LONGEST, 2 * self.LONGEST, self.LONGEST):
            model = tiny_model()
            result = accumulate_gradients(
                model, groups, beta=beta, objective=name, token_budget=budget, share_prefix=share_prefix
            )
            assert apart(gradient(model), plain) < 1e-5
            loss = float(plain_loss(tiny_model(), groups, name, beta).detach())
            assert float(result["loss"]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
            assert result["groups"] == 3

    @on_tokens
    def test_what_other_splits_would_be(self, name: str) -> None:
        """The negative controls: centring within a micro-batch, and a completion's log-probs a token too late."""
        groups, beta = stale_groups(), 0.1
        plain = plain_gradient(groups, name, beta)
        parts = [
            replace(group, completions=group.completions[at : at + 2])
            for group in groups
            for at in range(0, group.k, 2)
        ]
        model = tiny_model()
        accumulate_gradients(model, parts, beta=beta, objective=name)
        assert apart(gradient(model), plain) > 1e-2
        if name == "rloo":  # which sees their sum alone
            return
        for group in groups:
            for one in group.completions:
                old = one.old_token_logprobs or []
                one.old_token_logprobs = old[-1:] + old[:-1]
        model = tiny_model()
        accumulate_gradients(model, groups, beta=beta, objective=name)
        assert apart(gradient(model), plain) > 1e-2

    @on_tokens
    def test_splits_in_whole_groups_add_up(self, name: str) -> None:
        groups = stale_groups()
        model = tiny_model()
        for part in (groups[:1], groups[1:2], groups[2:]):
            accumulate_gradients(model, part, beta=0.1, objective=name, denominator=3)
        assert apart(gradient(model), plain_gradient(groups, name, 0.1)) < 1e-5

    @on_tokens
    def test_no_groups(self, name: str) -> None:
        for groups in ([], stale_groups()[1:2]):
            model = tiny_model()
            result = accumulate_gradients(model, groups, beta=0.1, objective=name)
            assert (float(result["loss"]), result["groups"]) == (0.0, 0) and not gradient(model).any()


class TestRefused:
    def refused(self, groups: list[Group], **options: Any) -> str:
        model = tiny_model()
        with pytest.raises(UserError) as caught:
            accumulate_gradients(model, groups, **{"beta": 0.1, "objective": "grpo", **options})
        assert all(parameter.grad is None for parameter in model.parameters())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @on_tokens
    @pytest.mark.parametrize("field", ["ref_token_logprobs", "old_token_logprobs"])
    def test_a_reward_without_token_log_probs(self, name: str, field: str) -> None:
        groups = stale_groups()
        setattr(groups[3].completions[1], field, None)  # no reward: none needed
        accumulate_gradients(tiny_model(), groups, beta=0.1, objective=name)
        setattr(groups[2].completions[1], field, None)
        assert f"group 2, member 1: a reward without {field}" in self.refused(groups, objective=name)
        accumulate_gradients(tiny_model(), groups, beta=0.1)

    @pytest.mark.parametrize("value", [math.nan, -math.inf])
    @pytest.mark.parametrize("field", ["ref_token_logprobs", "old_token_logprobs"])
    def test_token_log_probs_that_are_not_finite(self, field: str, value: float) -> None:
        groups = stale_groups()
        getattr(groups[2].completions[1], field)[3] = value
        assert f"group 2, member 1: its {field} are not all finite" in self.refused(groups)

    @pytest.mark.parametrize("field", ["ref_token_logprobs", "old_token_logprobs"])
    @pytest.mark.parametrize("more", [[], [-1.0] * 2])
    def test_token_log_probs_of_another_completion(self, field: str, more: list[float]) -> None:
        groups = stale_groups()
        setattr(groups[2].completions[1], field, [-1.0] * 11 + more)
        assert f"group 2, member 1: {11 + len(more)} {field} for 12 token_ids" in self.refused(groups)

    @every
    def test_beta_zero(self, name: str) -> None:
        if OBJECTIVES[name].takes_zero_beta:
            assert GVPOConfig(objective=name, beta=0).beta == 0  # pyright: ignore[reportArgumentType]
            return
        with pytest.raises(ConfigError, match=f"^config, field 'beta': must be greater than 0 for objective='{name}'"):
            GVPOConfig(objective=name, beta=0)  # pyright: ignore[reportArgumentType]


def test_the_configs_names_are_the_objectives() -> None:
    assert get_args(config_module.Objectives) == tuple(OBJECTIVES)
    assert all(name in GVPOConfig.model_fields for one in OBJECTIVES.values() for name in one.settings)


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_token_log_probs_survive_files(tmp_path: Path, extension: str) -> None:
    groups = stale_groups()
    groups[1].completions[0].old_token_logprobs = None
    write_groups(groups, tmp_path / f"groups.{extension}")
    assert list(read_groups(tmp_path / f"groups.{extension}")) == groups
    assert groups[2].completions[2].old_token_logprobs == []


# The trainer


@every
@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_every_objective_trains_on_stale_rollouts(name: str, reference: str) -> None:
    """And each update's loss is the formula's on the trainer's groups, under the settings of the config."""
    options = {"epsilon": 0.05, "max_completion_length": 5}
    config = settings(
        objective=name, reference=reference, updates_per_rollout=3, max_steps=6, beta=0.3, learning_rate=0.03, **options
    )
    trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=config)
    start, update, losses = weights(trainer.model), trainer._update, []
    used = {setting: options[setting] for setting in OBJECTIVES[name].settings}

    def checked() -> dict[str, Any]:
        groups = trainer._batch(trainer.progress.batch).groups
        with torch.no_grad():
            losses.append(float(plain_loss(trainer.model, groups, name, 0.3, **used)))
        return update()

    trainer._update = checked  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert [row["loss"] for row in trainer.history] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert [row["update"] for row in trainer.history] == [1, 2, 3, 4, 5, 6]
    stale = [row["log_ratio/max"] > 1e-3 for row in trainer.history]
    assert stale == [False, True, True, reference == "initial", True, True]
    assert not same_weights(weights(trainer.model), start)


@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if one.takes_zero_beta])
def test_beta_zero_trains(name: str) -> None:
    history = run(tiny_model(), prompts(), first_token, objective=name, beta=0, max_steps=2).history
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert not any("r2" in row or "constant" in row for row in history)


class TestTheSamplingPolicy:
    def passes(self, monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> tuple[int, list[float]]:
        """How many batches are scored outside the updates, and each update's largest |log-ratio| to the sampler."""
        calls, ratios = [], []

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return score_groups(*args, **kwargs)

        def loss(logps_NT: Tensor, old_NT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            ratios.append(float((logps_NT.detach() - old_NT).abs().max()))  # places without a token are 0 in both
            return OBJECTIVES[name].loss(logps_NT, old_NT, *args, **kwargs)

        monkeypatch.setattr(loop_module, "score_groups", counting)
        trainer = GVPOTrainer(tiny_model(), prompts(), first_token, config=settings(objective=name, **options))
        trainer.objective = trainer.objective._replace(loss=loss)
        trainer.train()
        return len(calls), ratios

    @on_tokens
    @pytest.mark.parametrize("token_budget", [None, 8])
    def test_one_update_a_rollout_needs_no_scores(
        self, monkeypatch: pytest.MonkeyPatch, name: str, token_budget: int | None
    ) -> None:
        options: dict[str, Any] = {"updates_per_rollout": 1, "max_steps": 3, "token_budget": token_budget}
        calls, ratios = self.passes(monkeypatch, name, **options)
        assert calls == 0 and len(ratios) >= 3 and set(ratios) == {0.0}
        calls, ratios = self.passes(monkeypatch, name, reference="initial", **options)
        assert calls == 3 and set(ratios) == {0.0}  # the reference alone

    @on_tokens
    def test_more_updates_need_one_each(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        options: dict[str, Any] = {"updates_per_rollout": 3, "max_steps": 6, "learning_rate": 0.03}
        calls, ratios = self.passes(monkeypatch, name, **options)
        assert calls == 6  # the reference is the policy that sampled: scored once
        assert [ratio == 0.0 for ratio in ratios] == [True, False, False] * 2
        monkeypatch.undo()
        calls, ratios = self.passes(monkeypatch, name, reference="initial", **options)
        assert calls == 12
        assert [ratio == 0.0 for ratio in ratios] == [True, False, False] * 2

    def test_groups_from_a_dataset_count_as_this_policys_own(self) -> None:
        trainer = GVPOTrainer(tiny_model(), offline_groups(2), config=settings(objective="grpo", reference="initial"))
        refer = trainer._refer
        seen: list[Completion] = []

        def spy(groups: list[Group]) -> None:
            refer(groups)
            seen.extend(copy.deepcopy(one) for group in groups for one in group.completions)

        trainer._refer = spy  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train()
        assert seen[0].old_token_logprobs == seen[0].ref_token_logprobs is not None  # before the first update
        assert math.fsum(seen[0].ref_token_logprobs or []) == pytest.approx(seen[0].ref_logprob)
        assert seen[-1].old_token_logprobs != seen[-1].ref_token_logprobs

    @pytest.mark.parametrize("updates_per_rollout", [1, 2])
    def test_log_probs_that_members_bring_are_what_ratios_are_taken_against(self, updates_per_rollout: int) -> None:
        def loss(brought: float | None) -> float:
            groups = offline_groups(2)
            for one in (one for group in groups for one in group.completions):
                one.old_token_logprobs = None if brought is None else [brought] * len(one.token_ids or [])
            options = {"updates_per_rollout": updates_per_rollout, "max_steps": 1, "beta": 0.0, "epsilon": 0.99}
            config = settings(objective="rloo", reference="initial", **options)
            trainer = GVPOTrainer(tiny_model(), groups, config=config)
            trainer.train()
            assert {tuple(one.old_token_logprobs or []) for group in groups for one in group.completions} <= {
                (brought,) * n for n in range(9)
            } | {()}
            return trainer.history[0]["loss"]

        # Of its own samples the ratios are 1, and the advantages of a group sum to zero.
        assert loss(None) == pytest.approx(0, abs=1e-6)
        assert abs(loss(-9.0)) > 1e-3


@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_a_run_on_tokens_resumes_within_a_rollout(tmp_path: Path, reference: str) -> None:
    def trainer_in(folder: Path, seed: int = 0) -> GVPOTrainer:
        options = {"updates_per_rollout": 3, "epochs_per_rollout": 2, "max_steps": 8, "save_steps": 4}
        config = settings(output_dir=str(folder), objective="grpo", reference=reference, learning_rate=0.03, **options)
        return GVPOTrainer(tiny_model(seed), prompts(7), first_token, config=config)

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    saved = list(read_groups(tmp_path / "whole" / "checkpoints" / "step-4" / "groups.jsonl"))
    assert all(one.old_token_logprobs for group in saved for one in group.completions)

    parts = trainer_in(tmp_path / "parts")
    update = parts._update

    def dying() -> dict[str, Any]:
        if parts.progress.update == 6:
            raise KeyboardInterrupt
        return update()

    parts._update = dying  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    again = trainer_in(tmp_path / "parts", seed=5)
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again.model), weights(whole.model))
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert len(rows_of(tmp_path / "parts" / "metrics.jsonl")) == 8


# Where they lead

BETA = 0.3
SEQUENCES = exact.all_sequences()
REWARD_OF = torch.rand(exact.VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
"""By the first token: an optimum that a few updates come near to."""


def distances(name: str) -> tuple[float, float]:
    """Total variation to pi_ref exp(R / beta) / Z before and after 100 updates on groups drawn uniformly."""
    draw = random.Random(0)
    groups = [
        Group(
            None,
            [
                Completion(token_ids=ids, reward=REWARD_OF[ids[0]], truncated=ids[-1] != exact.END)
                for ids in draw.choices(SEQUENCES, k=32)
            ],
            prompt_ids=exact.PROMPT,
        )
        for _ in range(100)
    ]
    model = exact.tiny_llama(num_hidden_layers=1)
    start = exact.exact_logprobs(model)
    rewards = torch.tensor([REWARD_OF[ids[0]] for ids in SEQUENCES], dtype=torch.float64)
    optimum = (start + rewards / BETA).log_softmax(0)
    options: dict[str, Any] = {"groups_per_update": 1, "updates_per_rollout": 5, "max_steps": 100}
    run(model, groups, objective=name, beta=BETA, reference="initial", learning_rate=4e-3, **options)
    after = exact.exact_logprobs(model)
    return exact.total_variation(start, optimum), exact.total_variation(after, optimum)


@pytest.mark.parametrize(("name", "left"), [("gvpo", 0.6), ("reinforce", 0.6), ("rebel", 0.6), ("kimi_pmd", 0.8)])
def test_what_fits_the_optimum_comes_near_it(name: str, left: float) -> None:
    before, after = distances(name)
    assert before > 0.3 and after < left * before


@pytest.mark.parametrize("name", ["grpo", "dpo", "gvpo_no_cov"])
def test_what_does_not_ends_elsewhere(name: str) -> None:
    before, after = distances(name)
    assert after > before
