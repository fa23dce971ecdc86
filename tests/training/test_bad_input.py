"""A user's mistakes through the trainer: one line that says what and where, before anything is lost."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from training_helpers import (
    CHAT_TEMPLATE,
    VOCABULARY,
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

from gvpo.errors import UserError
from gvpo.group_files import write_groups
from gvpo.groups import Completion, Group
from gvpo.training.loop import GVPOTrainer

CHAT = [{"role": "user", "content": "abc"}]


def refusal(model: Any, data: Any, rewards: Any = None, **kwargs: Any) -> str:
    """The message with which the trainer is refused, or stops in its first rollout; no weight has moved by then."""
    before = weights(model) if isinstance(model, torch.nn.Module) else {}
    with pytest.raises(UserError) as caught:
        run(model, data, rewards, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    if before:
        assert same_weights(before, weights(model))
    return message


def at_start(model: Any, data: Any, rewards: Any = None, **kwargs: Any) -> str:
    """The same, for what must be found before anything is drawn."""
    own = {name: kwargs.pop(name) for name in ("tokenizer", "eval_dataset") if name in kwargs}
    with pytest.raises(UserError) as caught:
        GVPOTrainer(model, data, rewards, config=settings(**kwargs), **own)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rewards' columns


@pytest.mark.parametrize("answers", [["$$"], "\\boxed{5", [], float("nan")])
def test_accepted_answers_that_are_none(answers: Any) -> None:
    rows = [*prompts(2), {"prompt_ids": [1], "answers": answers}]
    rows = [{"answers": ["5"], **row} for row in rows]
    message = at_start(tiny_model(), rows, "math_accuracy", tokenizer=letters_tokenizer())
    assert message.startswith("train_dataset, row 3: reward 'math_accuracy': column 'answers': ")
    # Another function may mean anything by it.
    GVPOTrainer(tiny_model(), rows, first_token, config=settings())


# Prompts, tokenizer, model


def test_a_prompt_longer_than_the_context() -> None:
    message = at_start(tiny_model(), [*prompts(1), {"prompt_ids": [1] * 61}], first_token)
    assert message.startswith("train_dataset, row 2, field 'prompt': 61 tokens") and "context of 64" in message
    GVPOTrainer(tiny_model(), [{"prompt_ids": [1] * 60}], first_token, config=settings())


def test_a_text_longer_than_the_context() -> None:
    for prompt in ("a" * 61, [{"role": "user", "content": "a" * 60}]):
        message = at_start(tiny_model(), [{"prompt": prompt}], first_token, tokenizer=letters_tokenizer(CHAT_TEMPLATE))
        assert "row 1" in message and "61 tokens" in message
    GVPOTrainer(tiny_model(), [{"prompt": "a" * 60}], first_token, config=settings(), tokenizer=letters_tokenizer())


def test_a_held_out_prompt_longer_than_the_context() -> None:
    held_out = [{"prompt_ids": [1] * 61, "completions": [{"token_ids": [1]}, {"token_ids": [2]}]}]
    message = at_start(tiny_model(), prompts(), first_token, eval_dataset=held_out)
    assert message.startswith("eval_dataset, row 1, field 'prompt': 61 tokens")


def test_an_offline_row_longer_than_the_context() -> None:
    row = Group(None, [Completion(None, [1] * n, reward=1.0) for n in (2, 62)], prompt_ids=[1, 2, 3])
    message = at_start(tiny_model(), [*offline_groups(1), row])
    assert "row 2" in message and "3 tokens and a completion of 62" in message and "context of 64" in message
    for prompt in ({"prompt": "abc"}, {"prompt_ids": [0, 1, 2]}):
        text = {**prompt, "completions": ["a", "a" * 61], "rewards": [0, 1]}
        message = at_start(tiny_model(), [text], tokenizer=letters_tokenizer())
        assert "3 tokens and a completion of 62" in message  # the end token is one of them


def test_rows_that_exceed_the_token_budget() -> None:
    message = at_start(tiny_model(), [{"prompt_ids": [1] * 13}], first_token, token_budget=16)
    assert "13 tokens and max_completion_length=4 exceed token_budget=16" in message
    GVPOTrainer(tiny_model(), [{"prompt_ids": [1] * 12}], first_token, config=settings(token_budget=16))
    row = Group(None, [Completion(None, [1] * n, reward=1.0) for n in (2, 14)], prompt_ids=[1, 2, 3])
    assert "a completion of 14 exceed token_budget=16" in at_start(tiny_model(), [row], token_budget=16)


def test_a_budget_smaller_than_one_completion() -> None:
    message = at_start(tiny_model(), prompts(), first_token, token_budget=4, max_completion_length=4)
    assert message.startswith("config, field 'token_budget': 4 cannot hold")


def test_max_completion_length_is_no_limit_where_nothing_is_sampled() -> None:
    history = run(tiny_model(), offline_groups(), token_budget=32, max_completion_length=2048, max_steps=1).history
    assert history[0]["groups"] == 2


@pytest.mark.parametrize("sampled", [True, False])
def test_ids_outside_the_vocabulary(sampled: bool) -> None:
    good, bad = Completion(None, [1], reward=0.0), Completion(None, [1, VOCABULARY], reward=1.0)
    rows: list[Any] = [{"prompt_ids": [1, VOCABULARY]}] if sampled else [Group(None, [good, bad], prompt_ids=[1])]
    message = at_start(tiny_model(), [*prompts(1), *rows], first_token)
    field = "prompt_ids" if sampled else "completions[1].token_ids"
    assert message.startswith(f"train_dataset, row 2, field {field!r}: token id 16 is outside")


def test_ids_that_are_not_their_text(tmp_path: Path) -> None:
    """What another tokenizer made, with ids that this one has too; ids that a program gives are used as they are."""
    group = Group("ab", [Completion("c", [2, 15], reward=0.0), Completion("d", [4, 15], reward=1.0)], prompt_ids=[0, 1])
    write_groups([group], tmp_path / "a.jsonl")
    said = refusal(tiny_model(), str(tmp_path / "a.jsonl"), tokenizer=letters_tokenizer())
    assert "line 1, field 'completions[1].token_ids': they are 'e' to this tokenizer and 'd' as text" in said
    run(tiny_model(), [group], tokenizer=letters_tokenizer(), max_steps=1)


def test_groups_of_one_alone_teach_nothing() -> None:
    one = Group(None, [Completion(None, [1], reward=1.0)], prompt_ids=[1])
    assert "neither this group nor any other has two completions" in at_start(tiny_model(), [one, one])
    GVPOTrainer(tiny_model(), [one, *offline_groups(1)], config=settings())


def test_max_completion_length_does_not_limit_the_datas_completions() -> None:
    row = Group(None, [Completion(None, [1] * n, reward=float(n)) for n in (2, 30)], prompt_ids=[1, 2, 3])
    history = run(tiny_model(), [row], max_completion_length=4, max_steps=1).history
    assert history[0]["completions/max_length"] == 30


def test_text_without_a_tokenizer() -> None:
    message = at_start(tiny_model(), [*prompts(1), {"prompt": "abc"}], first_token)
    assert message.startswith("train_dataset, row 2, field 'prompt'") and "tokenizer" in message
    row = {"prompt_ids": [1], "completions": ["a", "b"], "rewards": [0, 1]}
    message = at_start(tiny_model(), [row])
    assert message.startswith("train_dataset, row 1, field 'completions'") and "tokenizer" in message
    assert "eval_dataset" in at_start(tiny_model(), prompts(), first_token, eval_dataset=[{"prompt": "a"}])


def test_chat_without_a_template() -> None:
    message = at_start(tiny_model(), [{"prompt": CHAT}], first_token, tokenizer=letters_tokenizer())
    assert "row 1, field 'prompt'" in message and "chat template" in message
    run(tiny_model(), [{"prompt": CHAT}], first_token, tokenizer=letters_tokenizer(CHAT_TEMPLATE), max_steps=1)


def test_an_empty_prompt() -> None:
    assert "row 1, field 'prompt': empty" in at_start(
        tiny_model(), [{"prompt": ""}], first_token, tokenizer=letters_tokenizer()
    )


def test_a_frozen_model() -> None:
    model = tiny_model().requires_grad_(False)
    assert "requires a gradient" in at_start(model, prompts(), first_token)


def test_a_models_path_that_is_none(tmp_path: Path) -> None:
    assert "no such folder" in at_start(str(tmp_path / "none"), prompts(), first_token)
    (tmp_path / "empty").mkdir()
    assert "config.json" in at_start(str(tmp_path / "empty"), prompts(), first_token)


def test_checks_run_in_the_promised_order() -> None:
    """Rewards, rows, model path: each with all later ones wrong too."""
    assert "nonsense" in at_start("./none", [{}], "nonsense")
    assert "row 1" in at_start("./none", [{}], first_token)
    assert "./none" in at_start("./none", prompts(), first_token)


# Rewards


def test_no_rewards_anywhere() -> None:
    assert "row 1: no rewards" in at_start(tiny_model(), prompts())
    data = offline_groups(2)
    for completion in data[1].completions:
        completion.reward = None
    assert "row 2: no rewards" in at_start(tiny_model(), data)
    assert "eval_dataset, row 1" in at_start(tiny_model(), offline_groups(2), eval_dataset=prompts(1))


def test_reward_weights_of_another_count() -> None:
    message = at_start(tiny_model(), prompts(), [first_token], reward_weights=[1, 2])
    assert "'reward_weights': 2 weights for 1 reward functions" in message


def raising(completion_ids: list[Any], **kwargs: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raising, "'raising' raised KeyError"),
        (lambda completion_ids, **_: [1.0], "returned 1 values, expected 12"),
        (lambda completion_ids, **_: ["1"] * len(completion_ids), "'1' (str)"),
        (lambda completion_ids, **_: 1.0, "a list with one number"),
        (lambda completion_ids, wrong, **_: [1.0] * len(completion_ids), "needs 'wrong'"),
        (lambda completion_ids: [1.0] * len(completion_ids), "**kwargs"),
    ],
)
def test_reward_functions_that_are_wrong(function: Any, says: str) -> None:
    assert says in refusal(tiny_model(), prompts(), function)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_name_function_prompt_and_completion(value: float) -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * (len(completions) - 1) + [value]

    rows = [{"prompt": "abc"}, {"prompt": "abc"}]
    message = refusal(tiny_model(), rows, broken, tokenizer=letters_tokenizer())
    assert "'broken'" in message and "prompt 'abc'" in message and "completion '" in message and str(value) in message


def test_a_metric_of_a_name_that_is_taken() -> None:
    def reward(completion_ids: list[Any], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("grad_norm", 1.0)
        return first_token(completion_ids)

    with pytest.raises(UserError, match=r"log_metric\('grad_norm'") as caught:
        run(tiny_model(), prompts(), reward)
    assert "\n" not in str(caught.value)


def test_rewards_that_overflow_are_named() -> None:
    message = refusal(tiny_model(), prompts(), lambda completion_ids, **_: [1e200 * ids[0] for ids in completion_ids])
    assert "not finite" in message and "update 1" in message


# Settings against what there is


def test_evaluation_without_data() -> None:
    for options in ({"eval_steps": 1}, {"eval_on_start": True}):
        (name,) = options
        assert f"field {name!r}" in at_start(tiny_model(), prompts(), first_token, **options)


def test_functions_that_cannot_be_called_are_found_at_the_start() -> None:
    rows = [{"prompt_ids": [1]}, {"prompt_ids": [2], "level": 3}]
    assert "add **kwargs" in at_start(tiny_model(), rows, lambda completion_ids: [0.0] * len(completion_ids))
    message = at_start(tiny_model(), rows, lambda completion_ids, solution, **_: [0.0] * len(completion_ids))
    assert "needs 'solution'" in message
    assert "rename it" in at_start(tiny_model(), [{"prompt_ids": [1], "trainer_state": 1}], first_token)


def test_a_column_that_a_rollout_lacks_is_none() -> None:
    seen = []

    def reward(completion_ids: list[Any], level: list[int | None], **_: Any) -> list[float]:
        seen.append(level)
        return first_token(completion_ids)

    rows = [{"prompt_ids": [1]}, {"prompt_ids": [2], "level": 3}]
    options = {"shuffle_dataset": False, "groups_per_update": 1, "updates_per_rollout": 1, "max_steps": 2}
    run(tiny_model(), rows, reward, **options)
    assert seen == [[None] * 3, [3] * 3]


def test_messages_that_the_template_refuses_are_found_at_the_start() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    rows = [{"prompt": CHAT}, {"prompt": [{"role": "system", "content": "a"}, *CHAT]}]
    message = at_start(tiny_model(), rows, first_token, tokenizer=letters_tokenizer(template))
    assert message.startswith("train_dataset, row 2: ") and "no system" in message


def test_an_update_that_changes_nothing_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"disable_tqdm": False, "max_steps": 2}
    run(tiny_model(), prompts(), lambda completion_ids, **_: [None] * len(completion_ids), **nothing)
    assert capsys.readouterr().out.count("no group has two rewarded completions") == 1


def test_arguments_of_the_wrong_kind() -> None:
    with pytest.raises(UserError, match="model is a NoneType"):
        GVPOTrainer(None, prompts(), first_token)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="model is a Linear; give a causal language model"):
        GVPOTrainer(torch.nn.Linear(2, 2), prompts(), first_token)
    with pytest.raises(UserError, match="tokenizer is a path"):
        GVPOTrainer(tiny_model(), prompts(), first_token, tokenizer="path")
    with pytest.raises(UserError, match="config is a dict; give a GVPOConfig"):
        GVPOTrainer(tiny_model(), prompts(), first_token, config={"max_steps": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="sources: an empty list; leave it out"):
        GVPOTrainer(tiny_model(), prompts(), first_token, sources=[])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained(dtype: torch.dtype) -> None:
    assert "float32 model" in at_start(tiny_model().to(dtype), prompts(), first_token)


def test_a_broken_model_is_one_line() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite logits"):
        run(model, prompts(), first_token)


def test_all_trackers_need_a_folder() -> None:
    assert "give output_dir" in at_start(tiny_model(), prompts(), first_token, report_to="all")


def test_trackers_that_cannot_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = at_start(tiny_model(), prompts(), first_token, report_to="tensorbord", output_dir=str(tmp_path))
    assert "'report_to': 'tensorbord'" in message and "did you mean 'tensorboard'?" in message
    assert "give output_dir" in at_start(tiny_model(), prompts(), first_token, report_to="tensorboard")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    message = at_start(tiny_model(), prompts(), first_token, report_to="tensorboard", output_dir=str(tmp_path))
    assert "not installed" in message


def test_columns_that_a_run_folder_cannot_keep(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "day": date(2020, 1, 1)}]
    message = at_start(tiny_model(), rows, first_token, output_dir=str(tmp_path / "run"))
    assert message.startswith("train_dataset, row 1, field 'day'") and "JSON" in message
    run(tiny_model(), rows, first_token, max_steps=1)
    members = [Completion(None, [n], reward=n, meta={"day": date(2020, 1, n + 1)}) for n in range(2)]
    message = at_start(tiny_model(), [Group(None, members, prompt_ids=[1])], output_dir=str(tmp_path / "run"))
    assert message.startswith("train_dataset, row 1, field 'completions[0].meta'")


def test_nothing_is_written_where_nothing_was_begun(tmp_path: Path) -> None:
    at_start(tiny_model(), prompts(), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_text_mistakes_cost_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that are wrong, the model is not even looked for."""
    monkeypatch.setattr("gvpo.training.loop.load_model", lambda *_, **__: sys.exit("loaded"))
    monkeypatch.setattr("gvpo.models.loading.check_hub", lambda *_: None)
    at_start("some/model", [{}], first_token)
    at_start("./none", prompts(), first_token)
    assert "./no-reference" in at_start("some/model", prompts(), first_token, reference="./no-reference")
