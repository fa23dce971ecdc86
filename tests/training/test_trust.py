"""Reference log-probs that data bring: recomputed, unless the user says to trust them; then a batch is compared."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import first_token, offline_groups, prompts, run, same_weights, settings, tiny_model, weights

from gvpo.errors import UserError
from gvpo.groups import Completion, Group, group_to_dict
from gvpo.models.scoring import Scorer
from gvpo.training import loop as loop_module
from gvpo.training.config import ConfigError
from gvpo.training.loop import GVPOTrainer
from gvpo.training.processes import OneProcess
from gvpo.training.refer import Trust, refer
from gvpo.training.reference import Reference, score_groups


def members(groups: list[Group]) -> list[Completion]:
    return [one for group in groups for one in group.completions]


def scored(count: int = 8, model: Any = None) -> list[Group]:
    """Offline groups that bring their log-probs under the model, token by token as well."""
    groups = offline_groups(count)
    how: dict[str, Any] = {"token_budget": None, "share_prefix": True, "processes": OneProcess(), "per_token": True}
    rows = score_groups(Scorer(tiny_model() if model is None else model), groups, **how).tolist()
    for member, row in zip(members(groups), rows, strict=True):
        member.ref_token_logprobs = row[: len(member.token_ids or [])]
        member.ref_logprob = sum(row)
    return groups


def shifted(groups: list[Group], nats: float) -> list[Group]:
    """The same groups, their log-probs this many nats a token off."""
    groups = copy.deepcopy(groups)
    for member in members(groups):
        assert member.ref_logprob is not None and member.token_ids is not None
        member.ref_logprob += nats * len(member.token_ids)
        if member.ref_token_logprobs is not None:
            member.ref_token_logprobs = [value + nats for value in member.ref_token_logprobs]
    return groups


def trusting(monkeypatch: pytest.MonkeyPatch, data: Any, **options: Any) -> tuple[GVPOTrainer, int, list[Group]]:
    """A trained trainer, how many batches were scored before updates, and the groups that reached the updates."""
    calls: list[int] = []
    seen: list[Group] = []
    gradients = loop_module.group_gradients

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return score_groups(*args, **kwargs)

    def watching(scorer: Any, groups: list[Group], **kwargs: Any) -> Any:
        seen.extend(copy.deepcopy(groups))
        return gradients(scorer, groups, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "score_groups", counting)
        patch.setattr(loop_module, "group_gradients", watching)
        values = {"trust_ref_logprobs": True, "shuffle_dataset": False, "learning_rate": 0.05, **options}
        trainer = run(tiny_model(), data, first_token, **values)
    return trainer, len(calls), seen


def test_by_default_they_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = scored()
    plain, calls, seen = trusting(monkeypatch, shifted(data, 5.0), trust_ref_logprobs=False)
    assert calls == 4
    assert [one.ref_logprob for one in members(seen)] == pytest.approx(
        [one.ref_logprob for one in members(data)], abs=1e-4
    )
    assert plain.history == trusting(monkeypatch, offline_groups(8), trust_ref_logprobs=False)[0].history


@pytest.mark.parametrize("as_rows", [False, True])
def test_what_is_trusted_is_used_and_one_batch_is_scored(monkeypatch: pytest.MonkeyPatch, as_rows: bool) -> None:
    data = shifted(scored(), 5e-4)  # within what is taken for equal, so that the two can be told apart
    rows: list[Any] = [group_to_dict(group) for group in data] if as_rows else data
    trainer, calls, seen = trusting(monkeypatch, rows, max_steps=8)
    assert calls == 1
    assert [one.ref_logprob for one in members(seen)] == [one.ref_logprob for one in members(data)] * 2
    assert trainer.history[-1]["log_ratio/max"] > 1


def test_trusted_numbers_train_as_computed_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for objective in ("gvpo", "grpo"):
        trusted, calls, _ = trusting(monkeypatch, scored(), max_steps=6, objective=objective, learning_rate=1e-3)
        assert calls == (1 if objective == "gvpo" else 7)  # ratios are taken against the policy, scored each time
        computed = trusting(monkeypatch, offline_groups(8), max_steps=6, objective=objective, learning_rate=1e-3)[0]
        for name, value in weights(computed.model).items():
            torch.testing.assert_close(weights(trusted.model)[name], value, atol=2e-4, rtol=0)


def test_those_that_bring_none_are_scored_with_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = shifted(scored(8), 5e-4)
    for group in (data[2], data[7]):
        group.completions[1].ref_logprob = None
    trainer, calls, seen = trusting(monkeypatch, data)
    assert calls == 3  # batches 1 and 3 for what is missing, batch 0 to compare
    for given, own, computed in zip(members(data), members(seen), members(scored()), strict=True):
        assert own.ref_logprob == (given.ref_logprob or pytest.approx(computed.ref_logprob, abs=1e-5))
    assert len(trainer.history) == 4


def test_members_without_a_reward_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    data = scored(8)
    data[0].completions[0].reward = data[0].completions[0].ref_logprob = None
    assert trusting(monkeypatch, data)[1] == 1


def test_drawn_completions_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [*scored(2), *prompts(2)]
    trainer, calls, seen = trusting(monkeypatch, data, reference="initial", max_steps=2)
    assert calls == 2 and all(one.ref_logprob is not None for one in members(seen))
    assert trainer.trust.checked


@pytest.mark.parametrize("nats", [2e-3, -2e-3, 1.0])
def test_a_number_of_another_reference(monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    good = scored()
    data = copy.deepcopy(good)
    data[1].completions[1] = shifted(data, nats)[1].completions[1]
    given, own = data[1].completions[1].ref_logprob, good[1].completions[1].ref_logprob
    with pytest.raises(UserError) as caught:
        trusting(monkeypatch, data)
    message = str(caught.value)
    assert "\n" not in message and "group 1 of the run" in message and str(data[1].prompt_ids)[:10] in message
    assert f"{given:.6g}" in message and f"{own:.6g}" in message
    assert f"{abs(nats):.2g} nats a token" in message and "trust_ref_logprobs" in message


def test_half_precision_is_compared_more_loosely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trusting(monkeypatch, shifted(scored(), 0.02), bf16=True)[1] == 1
    with pytest.raises(UserError, match=re.escape("(limit 0.05)")):
        trusting(monkeypatch, shifted(scored(), 0.1), bf16=True)


def test_the_length_that_counts_is_the_scored_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = offline_groups(2, sizes=(2,))
    member = data[0].completions[0]
    member.token_ids, member.loss_mask = [1, 2, 3, 4, 5], [True, False, False, False, False]
    score = score_groups(Scorer(tiny_model()), data, token_budget=None, share_prefix=True, processes=OneProcess())
    for one, value in zip(members(data), score.tolist(), strict=True):
        one.ref_logprob = value
    assert member.ref_logprob is not None
    member.ref_logprob += 3e-3  # less than 1e-3 for each of the five tokens
    with pytest.raises(UserError, match=re.escape("0.003 nats a token")):
        trusting(monkeypatch, data, updates_per_rollout=1)


def test_objectives_on_tokens_need_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"objective": "grpo", "updates_per_rollout": 1, "max_steps": 4}
    data = scored()
    assert trusting(monkeypatch, data, **options)[1] == 1
    data[2].completions[0].ref_token_logprobs = None
    _, calls, seen = trusting(monkeypatch, data, **options)
    assert calls == 2 and seen[2].completions[0].ref_token_logprobs is not None
    data = scored()
    tokens = data[0].completions[0].ref_token_logprobs
    assert tokens is not None
    tokens[0], tokens[1] = tokens[1], tokens[0]  # the sum is right
    with pytest.raises(UserError, match=re.escape("ref_token_logprobs[0]")):
        trusting(monkeypatch, data, **options)


@pytest.mark.parametrize("reference", ["rollout", 2, None])
def test_a_moving_reference_cannot_be_in_the_data(reference: Any) -> None:
    config = settings(trust_ref_logprobs=True, reference=reference)
    with pytest.raises(ConfigError, match="trust_ref_logprobs"):
        GVPOTrainer(tiny_model(), [*scored(2), *prompts(2)], first_token, config=config)


def test_a_run_that_goes_on_compares_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "trust_ref_logprobs": True, "learning_rate": 0.05}
    data = scored()
    whole = run(tiny_model(), data, output_dir=str(tmp_path), **options)
    again = GVPOTrainer(tiny_model(3), data, config=settings(**options))
    again.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")
    assert again.history == whole.history and same_weights(weights(again.model), weights(whole.model))


class TwoProcesses(OneProcess):
    """This process beside another, which has counted and found what is given."""

    def __init__(self, theirs: list[int], problems: list[str] | None = None) -> None:
        self.theirs, self.problems = theirs, problems or []

    def total(self, count: int) -> int:
        return count + self.theirs.pop(0)

    def interleave(self, items: Any) -> list[Any]:
        return [*items, *self.problems]


class One:
    def __init__(self, groups: list[Group]) -> None:
        self.groups, self.numbers = groups, list(range(len(groups)))


@pytest.mark.parametrize(
    ("theirs", "chosen"),
    [
        ([3, 3, 4, 4], [True, False]),  # all of theirs bring one too: the first is compared
        ([3, 3, 4, 3], [True, True]),
        ([3, 2, 4, 4], [True, True]),  # the first has to be scored; the second is compared
        ([0, 0, 0, 0], [True, False]),
    ],
)
def test_all_processes_decide_alike(theirs: list[int], chosen: list[bool]) -> None:
    batches = [One(scored(2)), One(scored(1))]
    trust = Trust(True, False, 1e-3, TwoProcesses(theirs))
    scored_ones = trust.to_score(batches)
    assert [batch in scored_ones for batch in batches] == chosen


def test_a_process_with_nothing_scores_with_the_others() -> None:
    trust = Trust(True, False, 1e-3, TwoProcesses([2, 2]))
    assert len(trust.to_score([One([])])) == 1
    trust = Trust(True, False, 1e-3, TwoProcesses([0, 0]))
    assert trust.to_score([One([])]) == [] and not trust.checked


def test_a_difference_on_another_process_stops_this_one() -> None:
    score: Callable[..., Tensor] = lambda scorer, groups: torch.zeros(0)  # noqa: E731
    trust = Trust(True, False, 1e-3, TwoProcesses([2, 2], ["group 7 differs"]))
    with pytest.raises(UserError, match="group 7 differs; set trust_ref_logprobs to false"):
        refer([One([])], Reference("rollout", Scorer(tiny_model())), score, trust, None)
