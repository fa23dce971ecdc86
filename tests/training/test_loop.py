"""The training loop: which groups meet which update, what the optimizer does with them, and what is reported."""

from __future__ import annotations

import asyncio
import copy
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    CHAT_TEMPLATE,
    END,
    first_token,
    letters_tokenizer,
    offline_groups,
    prompts,
    run,
    same_weights,
    settings,
    tiny_model,
    weights,
)
from transformers import LlamaForCausalLM

from gvpo.errors import UserError
from gvpo.group_files import read_groups
from gvpo.groups import Completion, Group
from gvpo.sources.policy import draw_seed
from gvpo.training import update as update_module
from gvpo.training.loop import GVPOTrainer


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[tuple[int, ...], int]]]:
    """For every update: prompt ids and number of members of each group that is back-propagated."""
    seen: list[list[tuple[tuple[int, ...], int]]] = []

    def watched(real: Any) -> Any:
        def spy(scorer: Any, encoded: Any, *args: Any) -> Any:
            seen.append([(tuple(group.prompt_ids), len(group.completion_ids)) for group in encoded])
            return real(scorer, encoded, *args)

        return spy

    for name in ("_backpropagate", "_backpropagate_known"):
        monkeypatch.setattr(update_module, name, watched(getattr(update_module, name)))
    return seen


def no_opinion(completion_ids: Sequence[Any], **kwargs: Any) -> list[None]:
    return [None] * len(completion_ids)


# Which groups, when


@pytest.mark.parametrize(
    ("per_rollout", "epochs", "max_steps"), [(1, 1, 3), (3, 1, 6), (2, 2, 8), (1, 3, 7), (3, 2, 8)]
)
def test_updates_and_rollouts(updates: list[Any], per_rollout: int, epochs: int, max_steps: int) -> None:
    shape = {"updates_per_rollout": per_rollout, "epochs_per_rollout": epochs, "max_steps": max_steps}
    history = run(tiny_model(), prompts(50), first_token, **shape).history
    assert [row["update"] for row in history] == list(range(1, max_steps + 1))
    assert [row["rollout"] for row in history] == [n // (per_rollout * epochs) + 1 for n in range(max_steps)]
    assert [len(groups) for groups in updates] == [2] * max_steps
    assert all(members == 3 for groups in updates for _, members in groups)
    rollout_size = 2 * per_rollout
    rollouts = math.ceil(max_steps / (per_rollout * epochs))
    assert history[-1]["epoch"] == pytest.approx(rollouts * rollout_size / 50)
    for start in range(0, max_steps, per_rollout):
        # Fifty prompts, no two alike: one pass over a rollout takes each of its groups once.
        one_pass = Counter(prompt for groups in updates[start : start + per_rollout] for prompt, _ in groups)
        assert set(one_pass.values()) == {1}
    for start in range(0, max_steps - per_rollout * epochs, per_rollout * epochs):
        passes = [updates[start + n * per_rollout : start + (n + 1) * per_rollout] for n in range(epochs)]
        assert all(one == passes[0] for one in passes)


def test_an_epoch_takes_every_row_once(updates: list[Any]) -> None:
    data = offline_groups(9, sizes=(2, 3))
    run(tiny_model(), data, max_steps=None, num_train_epochs=1, groups_per_update=3, updates_per_rollout=3)
    assert len(updates) == 3
    seen = Counter((prompt, members) for groups in updates for prompt, members in groups)
    assert seen == Counter((tuple(group.prompt_ids or []), group.k) for group in data)


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (10, {"groups_per_update": 4}, 3),  # 10 / 4 = 2.5
        (10, {"groups_per_update": 5}, 2),
        (10, {"groups_per_update": 4, "num_train_epochs": 0.5}, 2),  # 5 / 4
        (10, {"groups_per_update": 4, "num_train_epochs": 2}, 5),
        (10, {"groups_per_update": 4, "epochs_per_rollout": 2}, 6),
        (10, {"groups_per_update": 4, "updates_per_rollout": 4}, 3),
        (10, {"groups_per_update": 4, "max_steps": 7, "num_train_epochs": 1}, 7),
        (1, {"groups_per_update": 4}, 1),
    ],
)
def test_how_many_updates(rows: int, options: dict[str, Any], expected: int) -> None:
    trainer = GVPOTrainer(tiny_model(), prompts(rows), first_token, config=settings(**{"max_steps": None, **options}))
    assert trainer.total_updates == expected


def test_mixed_rows_are_drawn_for_or_taken_as_they_are(updates: list[Any]) -> None:
    (offline,) = offline_groups(1, sizes=(5,))
    history = run(tiny_model(), [offline, *prompts(1)], first_token, max_steps=1, updates_per_rollout=1).history
    assert sorted(members for _, members in updates[0]) == [3, 5]
    assert history[0]["source/dataset"] == pytest.approx(5 / 8) and history[0]["source/policy"] == pytest.approx(3 / 8)


def test_a_source_of_ones_own_fills_the_groups(updates: list[Any]) -> None:
    class Teacher:
        def fill(self, rows: Sequence[Any], wanted: Any, seeds: Any) -> list[list[Completion]]:
            return [[Completion(None, [first, END], source="teacher") for first in (1, 2)] for _ in rows]

    history = run(tiny_model(), prompts(), first_token, sources=Teacher(), max_steps=1).history
    assert [members for _, members in updates[0]] == [2, 2] and history[0]["source/teacher"] == 1


def test_a_source_may_give_text(tmp_path: Path) -> None:
    class Writer:
        def fill(self, rows: Sequence[Any], wanted: Any, seeds: Any) -> list[list[Completion]]:
            return [[Completion("ab", source="teacher"), Completion("c")] for _ in rows]

    options = {"tokenizer": letters_tokenizer(), "sources": Writer(), "max_steps": 1, "output_dir": str(tmp_path)}
    history = run(tiny_model(), [{"prompt": "abc"}], first_token, **options).history
    assert history[0]["completions/mean_length"] == (3 + 2) / 2  # the end token is one of them
    group = next(read_groups(tmp_path / "completions" / "rollout-000001.jsonl"))
    assert [completion.token_ids for completion in group.completions] == [[0, 1, END], [2, END]]


def test_draws_depend_on_seed_and_place_alone() -> None:
    model, asked = tiny_model(), []
    trainer = GVPOTrainer(model, prompts(), first_token, config=settings(max_steps=4, seed=5))
    (policy,) = trainer.sources.members
    fill = policy.fill_one_by_one

    def spy(rows: Sequence[Any], wanted: Sequence[int], seeds: Sequence[int], drawn: Any) -> None:
        asked.append(list(seeds))
        fill(rows, wanted, seeds, drawn)

    policy.fill_one_by_one = spy  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert asked == [[draw_seed(5, rollout, n) for n in range(4)] for rollout in range(2)]
    assert len({seed for seeds in asked for seed in seeds}) == 8


# The optimizer


def expected_weights(
    model: LlamaForCausalLM, batches: list[list[Group]], rates: list[float], *, clip: float, decay: float
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """The same training by plain means: autograd through the model's own logits, AdamW parameter by parameter.

    Reference "initial", beta 0.1. Returns weights, gradient norms and losses.
    """
    start = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms, losses = [], []

    def logp(policy: LlamaForCausalLM, group: Group, completion: Completion) -> torch.Tensor:
        assert group.prompt_ids is not None and completion.token_ids is not None
        ids = torch.tensor([group.prompt_ids + completion.token_ids])
        logps = policy(ids).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        return logps.gather(1, ids[0, len(group.prompt_ids) :, None]).sum()

    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        loss = torch.zeros(())
        for group in batch:
            ratios = torch.stack([logp(model, group, c) - logp(start, group, c).detach() for c in group.completions])
            rewards = torch.tensor([c.reward for c in group.completions])
            residuals = 0.1 * (ratios - ratios.mean()) - (rewards - rewards.mean())
            loss = loss + residuals.square().sum() / (2 * (group.k - 1)) / len(batch)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        norms.append(norm)
        losses.append(float(loss.detach()))
        scale = min(1.0, clip / norm) if clip else 1.0
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name] * scale
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                p.mul_(1 - rate * (decay if p.dim() >= 2 else 0))
                moment, spread = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                p.sub_(rate * moment / (spread.sqrt() + 1e-8))
    return weights(model), norms, losses


@pytest.mark.parametrize(("clip", "decay"), [(0.05, 0.0), (0.0, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize("token_budget", [None, 12])
def test_training_is_adamw_on_the_loss(clip: float, decay: float, token_budget: int | None) -> None:
    data = offline_groups(6, sizes=(3, 2, 4))
    # Linear decay over four updates, of which the first is warm-up.
    rates = [0.0, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    batches = [data[:2], data[2:4], data[4:], data[:2]]
    expected, norms, losses = expected_weights(tiny_model(), batches, rates, clip=clip, decay=decay)
    model = tiny_model()
    options = {"warmup_steps": 1, "max_grad_norm": clip, "weight_decay": decay, "token_budget": token_budget}
    history = run(model, data, shuffle_dataset=False, beta=0.1, max_steps=4, updates_per_rollout=1, **options).history
    assert [row["learning_rate"] for row in history] == pytest.approx(rates)
    assert [row["grad_norm"] for row in history] == pytest.approx(norms, rel=1e-3)
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-3)
    for name, p in model.named_parameters():
        # A hundredth of one step: where a gradient is nearly zero, AdamW magnifies its rounding.
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-4, rtol=0)


def test_weight_decay_is_on_matrices_alone() -> None:
    model = tiny_model()
    before = weights(model)
    equal = [Group(None, [Completion(None, [n, END], reward=1.0) for n in (1, 2)], prompt_ids=[3])]
    run(model, equal, learning_rate=0.1, weight_decay=0.5, max_steps=1, updates_per_rollout=1)
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p.detach(), expected)
    assert any(p.dim() < 2 for p in model.parameters())


def shares(schedule: str, total: int, warmup: int = 0) -> list[float]:
    """Learning rates over their peak."""
    options = {"lr_scheduler_type": schedule, "max_steps": total, "warmup_steps": warmup, "updates_per_rollout": 1}
    history = run(tiny_model(), offline_groups(), learning_rate=0.01, **options).history
    return [row["learning_rate"] / 0.01 for row in history]


def test_learning_rate_schedules() -> None:
    assert shares("linear", 4) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])
    assert shares("linear", 6, warmup=2) == pytest.approx([0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4])
    assert shares("constant", 3) == [1, 1, 1]
    assert shares("constant_with_warmup", 4, warmup=2) == pytest.approx([0, 1 / 2, 1, 1])
    assert shares("cosine", 4) == pytest.approx([(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)])


def test_gradients_left_over_from_before_are_not_trained_on() -> None:
    results = []
    for leftover in (False, True):
        model = tiny_model()
        if leftover:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        run(model, offline_groups(), max_steps=1)
        results.append(weights(model))
    assert same_weights(*results)


# Members without a reward


def without(groups: list[Group], group: int, member: int) -> list[Group]:
    groups = copy.deepcopy(groups)
    del groups[group].completions[member]
    return groups


def test_a_member_without_a_reward_leaves_its_group() -> None:
    data = offline_groups(2, sizes=(3, 4))
    gone = without(data, 1, 2)
    data[1].completions[2].reward = None
    one, other = tiny_model(), tiny_model()
    history = run(one, data, max_steps=3, updates_per_rollout=1).history
    without_it = run(other, gone, max_steps=3, updates_per_rollout=1).history
    assert same_weights(weights(one), weights(other))
    assert [row.pop("members/dropped") for row in history] == [1, 1, 1]
    assert [row.pop("members/dropped") for row in without_it] == [0, 0, 0]
    assert history == without_it


@pytest.mark.parametrize("left", [0, 1])
def test_a_group_with_fewer_than_two_rewards_contributes_nothing(left: int) -> None:
    data = offline_groups(2, sizes=(3, 4), seed=4)
    for completion in data[1].completions[left:]:
        completion.reward = None
    options = {"shuffle_dataset": False, "updates_per_rollout": 1, "max_steps": 2}
    one, other = tiny_model(), tiny_model()
    history = run(one, data, first_token, **options).history if left else None
    if history is None:  # all None: the row counts as one without rewards, and functions are asked

        def none_for_the_second(target: list[int], **kwargs: Any) -> list[float | None]:
            return [None if n == 1 else 1.0 for n in target]

        history = run(one, data, none_for_the_second, **options).history
    alone = run(other, data[:1], groups_per_update=1, **{**options}).history
    assert same_weights(weights(one), weights(other))
    assert [row["members/dropped"] for row in history] == [4, 4]
    assert [row["loss"] for row in history] == [row["loss"] for row in alone]
    assert [row["groups"] for row in history] == [1, 1]


def test_an_update_without_a_group_changes_nothing() -> None:
    class Mute:
        calls = 0

        def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> Sequence[float | None]:
            self.calls += 1
            return first_token(completion_ids) if self.calls == 1 else [None] * len(completion_ids)

    results = []
    for max_steps in (1, 3):
        model = tiny_model()
        options = {"lr_scheduler_type": "constant", "updates_per_rollout": 1, "weight_decay": 0.1}
        history = run(model, prompts(), Mute(), max_steps=max_steps, **options).history
        results.append(weights(model))
    assert same_weights(*results)
    assert not same_weights(results[0], weights(tiny_model()))
    for row in history[1:]:
        assert row["loss"] == 0 and row["grad_norm"] == 0 and row["members/dropped"] == 6
        assert "reward" not in row


def test_equal_rewards_on_fresh_groups_change_nothing() -> None:
    model = tiny_model()
    history = run(model, prompts(), lambda completion_ids, **_: [0.3] * len(completion_ids), max_steps=1).history
    assert same_weights(weights(model), weights(tiny_model()))
    assert history[0]["frac_reward_zero_std"] == 1 and history[0]["loss"] == pytest.approx(0, abs=1e-20)


def test_functions_with_no_opinion_leave_the_others_theirs() -> None:
    history = run(tiny_model(), prompts(), [no_opinion, first_token], max_steps=1).history
    assert history[0]["members/dropped"] == 0
    assert "rewards/no_opinion/mean" not in history[0]
    assert history[0]["rewards/first_token/mean"] == history[0]["reward"]


# Rewards


def test_reward_weights() -> None:
    def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    row = run(tiny_model(), prompts(), [first_token, length], reward_weights=[2, -0.5], max_steps=1).history[0]
    expected = 2 * row["rewards/first_token/mean"] - 0.5 * row["rewards/length/mean"]
    assert row["reward"] == pytest.approx(expected)


def test_the_datas_rewards_win_over_functions() -> None:
    data = offline_groups(2, sizes=(2,))
    history = run(tiny_model(), data, lambda completion_ids, **_: [9.0] * len(completion_ids), max_steps=1).history
    assert history[0]["reward"] == pytest.approx(sum(c.reward or 0 for g in data for c in g.completions) / 4)


def test_asynchronous_functions() -> None:
    async def later(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return first_token(completion_ids)

    one, other = tiny_model(), tiny_model()
    run(one, prompts(), later)
    run(other, prompts(), first_token)
    assert same_weights(weights(one), weights(other))


def test_the_trainers_state_and_log_metric() -> None:
    states = []

    def reward(completion_ids: list[Any], trainer_state: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        states.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("calls", len(states))
        return first_token(completion_ids)

    history = run(tiny_model(), prompts(), reward, max_steps=4).history
    assert states == [(0, 4), (2, 4)]
    assert [row["calls"] for row in history] == [1, 1, 2, 2]


def test_chat_completions_reach_functions_as_messages() -> None:
    seen = []

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(message["content"])) for (message,) in completions]

    chat = [{"role": "user", "content": "abc"}]
    run(tiny_model(), [{"prompt": chat}], reward, tokenizer=letters_tokenizer(CHAT_TEMPLATE), max_steps=1)
    assert len(seen) == 2 * 2 * 3  # one rollout: two updates of two groups of three
    assert all(prompt == chat and message["role"] == "assistant" for prompt, (message,) in seen)


def test_with_a_tokenizer_functions_get_texts_of_what_is_given_as_ids() -> None:
    seen = []

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(n) for n in range(len(completions))]

    given = Group(None, [Completion(token_ids=[0, 1, END]), Completion(token_ids=[2, END])], prompt_ids=[2, 2])
    rows = [given, {"prompt_ids": [0, 2]}, {"prompt": "ab"}, {"prompt": "cc", "completions": ["a", "b"]}]
    options = {"max_steps": 1, "groups_per_update": 4, "updates_per_rollout": 1, "shuffle_dataset": False}
    run(tiny_model(), rows, reward, tokenizer=letters_tokenizer(), **options)
    assert [prompt for prompt, _ in seen] == ["cc"] * 2 + ["ac"] * 3 + ["ab"] * 3 + ["cc"] * 2
    texts = [text for _, text in seen]
    assert texts[:2] + texts[-2:] == ["ab", "c", "a", "b"]
    assert all(isinstance(text, str) for text in texts)


def test_meta_of_ones_own_is_kept_and_counts_as_nothing() -> None:
    data = offline_groups(2, sizes=(3,))
    for number, completion in enumerate(c for group in data for c in group.completions):
        completion.meta["rewards"] = [0.5, [0.5], {"judge": "good", "human": 0.25}][number % 3]
    row = run(tiny_model(), data, max_steps=1).history[0]
    assert {name: row[name] for name in row if name.startswith("rewards/")} == {"rewards/human/mean": 0.25}


def test_what_functions_log_extra_is_kept_with_the_completions(tmp_path: Path) -> None:
    def reward(completion_ids: list[Any], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("lengths", torch.tensor([len(ids) for ids in completion_ids]))
        log_extra("notes", [f"first {ids[0]}" for ids in completion_ids])
        return first_token(completion_ids)

    data = [*prompts(2), *offline_groups(1, sizes=(2,)), *prompts(3)[2:]]  # the offline group is not asked about
    options = {"max_steps": 1, "groups_per_update": 4, "updates_per_rollout": 1, "shuffle_dataset": False}
    run(tiny_model(), data, reward, output_dir=str(tmp_path / "run"), **options)
    groups = list(read_groups(tmp_path / "run" / "completions" / "rollout-000001.jsonl"))
    for number, group in enumerate(groups):
        for one in group.completions:
            ids = one.token_ids or []
            expected = None if number == 2 else {"lengths": len(ids), "notes": f"first {ids[0]}"}
            assert one.meta.get("extra") == expected


def test_evaluations_reach_the_metrics_with_what_functions_log() -> None:
    def reward(completion_ids: list[Any], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("longest", max(map(len, completion_ids)))
        return first_token(completion_ids)

    row = run(tiny_model(), prompts(), reward, eval_dataset=prompts(3), max_steps=1).history[0]
    assert {"longest", "eval/longest"} <= row.keys()


def test_one_trainers_precision_is_not_anothers() -> None:
    def trained(bf16: bool, other: bool) -> dict[str, Any]:
        model = tiny_model()
        trainer = GVPOTrainer(model, prompts(), first_token, config=settings(bf16=bf16))
        if other:
            GVPOTrainer(tiny_model(1), prompts(), first_token, config=settings(bf16=not bf16))
        trainer.train()
        return weights(model)

    for bf16 in (False, True):
        assert same_weights(trained(bf16, other=False), trained(bf16, other=True))
    assert not same_weights(trained(False, other=False), trained(True, other=False))


def test_a_failure_is_no_end_to_the_display_or_the_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate.tracking import TensorBoardTracker

    finished: list[bool] = []
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda _self: finished.append(True))

    def failing(**kwargs: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(UserError, match="ZeroDivisionError"):
        run(tiny_model(), prompts(), failing, output_dir=str(tmp_path / "run"), report_to="tensorboard")
    assert finished == [True]


# Evaluation


def greedy(model: LlamaForCausalLM, prompt_ids: list[int], length: int) -> list[int]:
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + length and (len(ids) == len(prompt_ids) or ids[-1] != END):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_evaluation_is_greedy_and_comes_when_it_is_due() -> None:
    held_out = prompts(5)[1:]
    options = {"eval_steps": 2, "eval_on_start": True, "max_steps": 5, "temperature": 2.0}
    trainer = run(tiny_model(), prompts(), first_token, eval_dataset=held_out, **options)
    rows = {row["update"]: row for row in trainer.history}
    assert [update for update, row in rows.items() if "eval/reward" in row] == [0, 2, 4, 5]
    assert list(rows) == [0, 1, 2, 3, 4, 5]
    for update, model in ((0, tiny_model()), (5, trainer.model)):
        answers = [greedy(model, row["prompt_ids"], 4) for row in held_out]
        assert rows[update]["eval/reward"] == pytest.approx(sum(first_token(answers)) / 4)
        assert rows[update]["eval/rewards/first_token/mean"] == rows[update]["eval/reward"]
        assert rows[update]["eval/completions/mean_length"] == sum(map(len, answers)) / 4
        assert rows[update]["eval/completions/truncated"] == sum(ids[-1] != END for ids in answers) / 4
        assert rows[update]["eval/unscored"] == 0


def test_evaluation_changes_no_training() -> None:
    one, other = tiny_model(), tiny_model()
    run(one, prompts(), first_token, eval_dataset=prompts(3), eval_steps=1)
    run(other, prompts(), first_token)
    assert same_weights(weights(one), weights(other))


def test_evaluation_comes_at_the_end_by_default() -> None:
    history = run(tiny_model(), prompts(), first_token, eval_dataset=prompts(3), max_steps=3).history
    assert ["eval/reward" in row for row in history] == [False, False, True]


def test_evaluation_counts_answers_without_a_reward() -> None:
    history = run(tiny_model(), prompts(), no_opinion, eval_dataset=prompts(3), max_steps=1).history
    assert history[0]["eval/unscored"] == 3 and "eval/reward" not in history[0]
