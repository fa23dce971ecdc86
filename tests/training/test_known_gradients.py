"""Where log-ratios are zero by construction: nothing is scored for its weight, groups without one not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import offline_groups, prompts, settings, tiny_model, weights

from gvpo.groups import Group
from gvpo.models.scoring import Scorer, sequence_logprobs
from gvpo.objective import OBJECTIVES
from gvpo.training.loop import GVPOTrainer
from gvpo.training.update import Gradients, group_gradients


def groups_with_equal_ones(count: int = 6) -> list[Group]:
    """Ragged groups; in every second one all rewards are equal."""
    groups = offline_groups(count, sizes=(3, 2, 5, 1, 4))
    for group in groups[::2]:
        for member in group.completions:
            member.reward = 0.7
    return groups


def gradients(
    groups: list[Group], objective: str = "gvpo", **options: Any
) -> tuple[Gradients, list[Tensor], list[Any]]:
    """The gradients of a fresh model, and the ids of every forward."""
    scorer, read = Scorer(tiny_model()), []
    assert scorer.shares_prefix  # measured here, once
    hook = scorer.model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0]))
    given: dict[str, Any] = {"beta": 0.3, "tokenizer": None, "token_budget": None, "share_prefix": True}
    given |= {"settings": {}, "denominator": None, "own_reference": True, "own_rollout": True, **options}
    result = group_gradients(scorer, groups, objective=OBJECTIVES[objective], **given)
    hook.remove()
    return result, [p.grad for p in scorer.parameters() if p.grad is not None], read


def scored_reference(groups: list[Group]) -> list[Group]:
    """The same groups, the policy's own log-probs written down as the reference."""
    logps = iter(sequence_logprobs(tiny_model(), groups).tolist())
    for member in (member for group in groups for member in group.completions):
        member.ref_logprob = next(logps)
    return groups


@pytest.mark.parametrize("objective", ["gvpo", "reinforce", "rebel", "dr_grpo", "gvpo_no_cov", "gvpo_no_var"])
@pytest.mark.parametrize("budget", [None, 16])
def test_the_gradient_is_that_of_scoring_everything(objective: str, budget: int | None) -> None:
    groups = groups_with_equal_ones()
    known, ours, _ = gradients(groups, objective, token_budget=budget)
    # Unequal rewards by a hair: every group is scored, and its weights are as good as zero.
    for group in groups[::2]:
        group.completions[0].reward = 0.7 + 1e-9
    full, theirs, _ = gradients(groups, objective)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(float(one.abs().max()) > 0.01 for one in ours)
    torch.testing.assert_close(known.loss, full.loss, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_that_of_the_policys_own_scores_as_reference() -> None:
    groups = scored_reference(groups_with_equal_ones())
    known, ours, _ = gradients(groups)
    written, theirs, _ = gradients(groups, own_reference=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # log-ratios of 1e-6 nats from rounding
    torch.testing.assert_close(known.loss, written.loss, rtol=1e-4, atol=1e-6)


def test_groups_of_equal_rewards_are_not_read() -> None:
    groups = groups_with_equal_ones()
    result, _, read = gradients(groups)
    taught = [groups[1], groups[5]]  # of two more, one has a single member
    prompts, own = (
        (len(group.prompt_ids or []) for group in taught),
        (one for group in taught for one in group.completions),
    )
    assert sum(ids.numel() for ids in read) == sum(prompts) + sum(len(one.token_ids or []) - 1 for one in own)
    scores = result.logps_N.split([group.k for group in groups])
    assert [bool(part.any()) for part in scores] == [False, True, False, False, False, True]


def test_a_group_that_does_not_fit_is_read_once() -> None:
    groups = offline_groups(1, sizes=(5,))
    _, whole, once = gradients(groups)
    budget = max(len(groups[0].prompt_ids or []) + len(one.token_ids or []) for one in groups[0].completions)
    _, parts, read = gradients(groups, token_budget=budget)
    assert len(once) == 1 and len(read) > 1
    _, _, stale = gradients(scored_reference(groups), token_budget=budget, own_reference=False)
    assert len(stale) == 2 * len(read), "where weights depend on the scores, two passes"
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_any_weight_the_gradient_is_zero_not_missing() -> None:
    groups = groups_with_equal_ones()[::2]
    result, ours, _ = gradients(groups)
    assert len(ours) == len(list(tiny_model().parameters())) and not any(bool(one.any()) for one in ours)
    assert float(result.loss) == 0
    assert gradients([])[1] == [], "no group, no gradient"


def test_momentum_goes_on_through_updates_of_equal_rewards() -> None:
    def rewards(completion_ids: Any, trainer_state: Any, **_: Any) -> list[float]:
        late = trainer_state.global_step >= 2
        return [0.5 if late else float(ids[0] % 3) for ids in completion_ids]

    def run(updates: int) -> dict[str, Tensor]:
        config = settings(max_steps=updates, updates_per_rollout=1, learning_rate=0.01, lr_scheduler_type="constant")
        trainer = GVPOTrainer(tiny_model(), prompts(6), rewards, config=config)
        trainer.train()
        return weights(trainer.model)

    before, after = run(2), run(3)
    assert any(not torch.equal(before[name], after[name]) for name in before), "AdamW's moments move the weights"
