"""accumulate_gradients against plain autograd of the loss on one padded batch, however the batch is split."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import LONGEST, plain_logprobs, ragged_groups, tiny
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.scoring import Scorer
from gvpo.objective import gvpo_weights
from gvpo.training.update import accumulate_gradients

BETA = 0.1
ONE_GROUP = 4 * LONGEST
"""A budget that holds any one group, a row a completion, and not two of the larger ones."""
BUDGETS = [None, 10_000, ONE_GROUP, 2 * LONGEST, LONGEST]
WAYS = {"eager": "mask", "sdpa": "members"}
"""Attention, and the way in which packed groups then attend."""


def stale_groups() -> list[Group]:
    """Groups of 3, 1, 4 and 2 whose reference lies 5 to 18 nats from the policy, unevenly within each group."""
    groups = ragged_groups()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        logps = iter(plain_logprobs(tiny(), groups).tolist())
    for group in groups:
        for place, completion in enumerate(group.completions):
            drift = 5 + 13 * torch.rand((), generator=generator).item()
            completion.ref_logprob = next(logps) + (drift if place % 2 else -drift)
            completion.reward = torch.rand((), generator=generator).item()
    return groups


def padded_logprobs(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """log pi of every completion from one forward of one padded batch, float64 after the logits."""
    members = [(group.prompt_ids or [], c.token_ids or [], c.loss_mask) for group in groups for c in group.completions]
    width = max(len(prompt) + len(completion) for prompt, completion, _ in members)
    ids_NT = torch.tensor([[*prompt, *rest] + [0] * (width - len(prompt) - len(rest)) for prompt, rest, _ in members])
    scored_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
    for row, (prompt, rest, mask) in enumerate(members):
        scored_NT[row, len(prompt) : len(prompt) + len(rest)] = torch.tensor(
            mask or [True] * len(rest), dtype=torch.bool
        )
    logps_NTV = model(ids_NT).logits.double().log_softmax(-1)
    token_logps_NT = logps_NTV[:, :-1].gather(2, ids_NT[:, 1:, None])[..., 0]
    return (token_logps_NT * scored_NT[:, 1:]).sum(1)


def plain_loss(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The empirical loss of the paper, halved, written out group by group."""
    logps = iter(padded_logprobs(model, groups).unbind())
    losses = []
    for group in groups:
        errors = [(next(logps), member) for member in group.completions]
        errors = [
            BETA * (logp - member.ref_logprob) - member.reward for logp, member in errors if member.reward is not None
        ]
        if len(errors) >= 2:
            errors = torch.stack(errors)
            losses.append((errors - errors.mean()).square().sum() / (2 * (len(errors) - 1)))
    return torch.stack(losses).mean()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def plain_gradient(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    twin = copy.deepcopy(model)
    plain_loss(twin, groups).backward()
    return gradient(twin)


def apart(ours: Tensor, plain: Tensor) -> float:
    """Relative error."""
    return float((ours - plain).norm() / plain.norm())


class TestExactGradient:
    def test_both_ways_to_attend_are_tried(self) -> None:
        assert {attention: Scorer(tiny(attention=attention)).way for attention in WAYS} == WAYS

    def test_the_reference_is_far_away(self) -> None:
        groups = stale_groups()
        logps = plain_logprobs(tiny(), groups).tolist()
        refs = [member.ref_logprob for group in groups for member in group.completions]
        assert all(abs(logp - ref) > 5 for logp, ref in zip(logps, refs, strict=True))

    @pytest.mark.parametrize("share_prefix", [True, False])
    @pytest.mark.parametrize("budget", BUDGETS)
    @pytest.mark.parametrize("attention", WAYS)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
    def test_every_split(self, architecture: str, attention: str, budget: int | None, share_prefix: bool) -> None:
        model, groups = tiny(architecture, attention=attention), stale_groups()
        accumulate_gradients(model, groups, beta=BETA, token_budget=budget, share_prefix=share_prefix)
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5

    @pytest.mark.parametrize("attention", WAYS)
    @pytest.mark.parametrize("budget", range(LONGEST, 5 * LONGEST, 7))
    def test_budgets_between(self, budget: int, attention: str) -> None:
        model, groups = tiny(attention=attention), stale_groups()
        accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5

    def test_a_mean_over_part_of_a_group_is_another_gradient(self) -> None:
        # The negative control: what a trainer does that centres within a micro-batch of two completions.
        model, groups = tiny(), stale_groups()
        parts = [
            replace(group, completions=group.completions[start : start + 2])
            for group in groups
            for start in range(0, len(group.completions), 2)
        ]
        accumulate_gradients(model, parts, beta=BETA)
        assert apart(gradient(model), plain_gradient(model, groups)) > 1e-2

    def test_gradient_checkpointing_of_the_model(self) -> None:
        model, groups = tiny(), stale_groups()
        plain = plain_gradient(model, groups)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for budget in (None, LONGEST):
            model.zero_grad()
            accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
            assert apart(gradient(model), plain) < 1e-5

    def test_a_model_scored_through_its_own_logits(self) -> None:
        model, groups = tiny("llama4"), stale_groups()
        assert Scorer(model).head is None
        accumulate_gradients(model, groups, beta=BETA, token_budget=LONGEST)
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5


class TestWhatIsLeftAlone:
    def test_gradients_that_are_there_stay(self) -> None:
        for budget in (None, LONGEST):
            model, groups = tiny(), stale_groups()
            accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
            accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
            assert apart(gradient(model), 2 * plain_gradient(tiny(), groups)) < 1e-5

    def test_frozen_weights_get_none(self) -> None:
        model, groups = tiny(), stale_groups()
        model.model.requires_grad_(False)
        accumulate_gradients(model, groups, beta=BETA, token_budget=2 * LONGEST)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {"lm_head.weight"}

    def test_modes(self) -> None:
        for training in (True, False):
            model = tiny().train(training)
            model.model.layers[0].train(not training)
            modes = [module.training for module in model.modules()]
            accumulate_gradients(model, stale_groups(), beta=BETA, token_budget=LONGEST)
            assert [module.training for module in model.modules()] == modes

    def test_the_groups(self) -> None:
        groups = stale_groups()
        before = copy.deepcopy(groups)
        accumulate_gradients(tiny(), groups, beta=BETA)
        assert groups == before


class TestWhoTeaches:
    @pytest.mark.parametrize("budget", [None, LONGEST])
    def test_a_member_without_a_reward_leaves(self, budget: int | None) -> None:
        model, groups = tiny(), stale_groups()
        groups[0].completions[1].reward = None
        groups[2].completions[0].reward = None
        groups[2].completions[0].ref_logprob = None  # nor is a reference needed for it
        result = accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5
        assert result["groups"] == 3
        assert [place for place, weight in enumerate(result["weights_N"].tolist()) if weight == 0.0] == [1, 3, 4]

    @pytest.mark.parametrize("budget", [None, LONGEST])
    def test_a_group_left_with_one_teaches_nothing(self, budget: int | None) -> None:
        model, groups = tiny(), stale_groups()
        groups[3].completions[0].reward = None
        result = accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
        assert result["groups"] == 2
        assert result["weights_N"][-2:].tolist() == [0.0, 0.0]
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5

    @pytest.mark.parametrize("budget", [None, LONGEST])
    def test_nothing_to_learn_is_a_gradient_of_zero(self, budget: int | None) -> None:
        groups = stale_groups()
        for group in groups:
            for member in group.completions[1:]:
                member.reward = None
        for nothing in (groups, [groups[1]]):
            model = tiny()
            result = accumulate_gradients(model, nothing, beta=BETA, token_budget=budget)
            assert float(result["loss"]) == 0.0
            assert result["groups"] == 0
            assert not gradient(model).any()

    def test_no_groups(self) -> None:
        model = tiny()
        result = accumulate_gradients(model, [], beta=BETA)
        assert (float(result["loss"]), result["groups"], len(result["logps_N"])) == (0.0, 0, 0)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_equal_rewards_still_pull_towards_the_reference(self) -> None:
        model, groups = tiny(), stale_groups()
        for group in groups:
            for member in group.completions:
                member.reward = 1.0
        accumulate_gradients(model, groups, beta=BETA)
        assert gradient(model).norm() > 0
        assert apart(gradient(model), plain_gradient(model, groups)) < 1e-5


class TestResult:
    @pytest.mark.parametrize("budget", [None, LONGEST])
    def test_loss_weights_and_log_probs(self, budget: int | None) -> None:
        model, groups = tiny(), stale_groups()
        result = accumulate_gradients(model, groups, beta=BETA, token_budget=budget)
        assert result.keys() == {"loss", "weights_N", "logps_N", "groups"}
        with torch.no_grad():
            plain_N, loss = plain_logprobs(model, groups), plain_loss(model, groups)
        assert float((result["logps_N"].double() - plain_N).abs().max()) < 1e-4
        assert float(result["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert result["loss"].dtype == result["weights_N"].dtype == torch.float64
        assert not any(result[name].requires_grad for name in ("loss", "weights_N", "logps_N"))
        members = [(number, member) for number, group in enumerate(groups) for member in group.completions]
        refs_N, rewards_N = (
            torch.tensor([getattr(member, name) for _, member in members], dtype=torch.float64)
            for name in ("ref_logprob", "reward")
        )
        ids_N = torch.tensor([number for number, _ in members])
        expected_N = gvpo_weights(plain_N, refs_N, rewards_N, ids_N, beta=BETA)
        assert float((result["weights_N"] - expected_N).abs().max()) < 1e-4
        assert result["groups"] == 3

    def test_the_denominator_is_the_number_of_groups_to_average_over(self) -> None:
        for budget in (None, LONGEST):
            groups = stale_groups()
            plain = plain_gradient(tiny(), groups)
            model = tiny()
            accumulate_gradients(model, groups, beta=BETA, token_budget=budget, denominator=12)
            assert apart(gradient(model), plain * 3 / 12) < 1e-5
            model = tiny()  # two calls, a group apart, are one call
            for part in (groups[:1], groups[1:]):
                accumulate_gradients(model, part, beta=BETA, token_budget=budget, denominator=3)
            assert apart(gradient(model), plain) < 1e-5


class TestRefused:
    def refused(self, groups: list[Group], **options: Any) -> str:
        model = tiny()
        with pytest.raises(UserError) as caught:
            accumulate_gradients(model, groups, beta=BETA, **options)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_budget_one_too_small(self) -> None:
        line = self.refused(stale_groups(), token_budget=LONGEST - 1)
        assert "group 2, member 1" in line
        assert f"token_budget={LONGEST - 1}" in line

    def test_a_reward_without_a_reference(self) -> None:
        groups = stale_groups()
        groups[2].completions[3].ref_logprob = None
        assert "group 2, member 3: a reward without a ref_logprob" in self.refused(groups)

    @pytest.mark.parametrize("name", ["reward", "ref_logprob"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, name: str, value: float) -> None:
        groups = stale_groups()
        setattr(groups[2].completions[3], name, value)
        assert f"group 2, member 3: its {name} is {value}" in self.refused(groups)

    def test_an_unknown_objective(self) -> None:
        assert "'gvop'" in self.refused(stale_groups(), objective="gvop")

    def test_text_without_a_tokenizer(self) -> None:
        assert "group 0" in self.refused([Group("prompt", [Completion("text", reward=0.0, ref_logprob=-1.0)])])
