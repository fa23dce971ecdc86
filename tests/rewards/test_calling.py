from __future__ import annotations

import asyncio
import copy
import functools
import gc
import inspect
import math
import re
import threading
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import RewardFunction, resolve_rewards, score_groups


def text_group(prompt: Any, /, *texts: str, **columns: Any) -> Group:
    return Group(prompt, [Completion(text) for text in texts], columns=columns)


def id_group(*ids: list[int], **columns: Any) -> Group:
    return Group(None, [Completion(token_ids=one) for one in ids], prompt_ids=[7, 8], columns=columns)


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def constant(output: Any, name: str = "constant") -> RewardFunction:
    return RewardFunction(name, lambda **kwargs: output)


def raising(error: BaseException) -> RewardFunction:
    def fails(**kwargs: Any) -> list[float]:
        raise error

    return RewardFunction("fails", fails)


RAGGED = [text_group("one", "a", "b", "c"), text_group("two", "d")]


def received(groups: list[Group], **kwargs: Any) -> dict[str, Any]:
    """The keyword arguments that a function gets."""
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[None]:
        assert not seen, "called more than once"
        seen.update(arguments)
        return [None] * sum(len(group.completions) for group in groups)

    score_groups(groups, [RewardFunction("spy", spy)], None, **kwargs)
    return seen


def refusal(groups: list[Group], *functions: RewardFunction, weights: list[float] | None = None) -> str:
    """The one line that refuses."""
    with pytest.raises(UserError) as caught:
        score_groups(groups, list(functions), weights)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What a function gets


def test_string_prompts_give_one_string_a_member_and_groups_may_be_ragged():
    seen = received(RAGGED)
    assert seen["prompts"] == ["one", "one", "one", "two"]
    assert seen["completions"] == ["a", "b", "c", "d"]
    assert seen["completion_ids"] is None


def test_message_prompts_give_message_completions():
    seen = received([text_group(chat("hi"), "a", "b")])
    assert seen["prompts"] == [chat("hi"), chat("hi")]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]


def test_each_member_follows_its_own_prompt_where_chats_and_strings_are_mixed():
    seen = received([text_group("plain", "a"), text_group(chat("hi"), "b")])
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]


def test_without_texts_prompts_and_completions_are_none_and_ids_are_given():
    seen = received([id_group([1, 2], [3]), id_group([4])])
    assert seen["prompts"] is None
    assert seen["completions"] is None
    assert seen["completion_ids"] == [[1, 2], [3], [4]]


def test_one_member_without_an_id_or_text_takes_that_argument_from_all():
    both, text, ids = Completion("a", [1]), Completion("b"), Completion(token_ids=[3])
    assert received([Group("p", [both, both])])["completion_ids"] == [[1], [1]]
    assert received([Group("p", [both, text])])["completion_ids"] is None
    assert received([Group("p", [both, text])])["completions"] == ["a", "b"]
    assert received([Group("p", [both, ids])])["completions"] is None
    assert received([Group("p", [both, ids])])["prompts"] == ["p", "p"]


def test_columns_are_repeated_within_the_group_and_none_where_a_group_lacks_them():
    seen = received([text_group("p", "a", "b", answer="4", level=1), text_group("q", "c", answer="5")])
    assert seen["answer"] == ["4", "4", "5"]
    assert seen["level"] == [1, 1, None]


def test_columns_that_trl_leaves_out_are_left_out():
    seen = received([text_group("p", "a", prompt="other", completion="gold", completion_ids=[1], rewards=[2])])
    assert seen["prompts"] == ["p"]
    assert seen["rewards"] == [[2]]
    assert not {"prompt", "completion"} & set(seen) and seen["completion_ids"] is None


def test_the_trainer_state_is_handed_on_as_it_is():
    state = object()
    assert received(RAGGED, trainer_state=state)["trainer_state"] is state


def test_a_function_that_spoils_its_arguments_spoils_no_group_and_no_other_function():
    groups = [Group(chat("hi"), [Completion("a", [1, 2]), Completion("b", [3])], columns={"tests": [{"in": [1]}]})]
    before = copy.deepcopy(groups)
    seen: list[Any] = []

    def spoils(prompts: Any, completions: Any, completion_ids: Any, tests: Any, **kwargs: Any) -> list[float]:
        seen.append(copy.deepcopy((prompts, completions, completion_ids, tests)))
        prompts[0][0]["content"] = "spoilt"
        prompts[0].append({})
        completions[0][0]["content"] = "spoilt"
        completion_ids[0].append(9)
        tests[0][0]["in"].append(9)
        # Members of one group share nothing either.
        assert tests[1] == [{"in": [1]}]
        assert prompts[1] == chat("hi")
        return [0.0, 0.0]

    score_groups(groups, [RewardFunction("one", spoils), RewardFunction("two", spoils)], None)
    assert groups == before
    assert seen[0] == seen[1]


def test_rewards_that_groups_have_are_neither_used_nor_changed():
    group = Group("p", [Completion("a", reward=5.0), Completion("b")])
    assert score_groups([group], [constant([1.0, 2.0])], None).rewards == [[1.0, 2.0]]
    assert group.rewards == [5.0, None]


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_a_column_with_the_name_of_another_argument_is_refused(name: str):
    message = refusal([text_group("p", "a", **{name: 1})], constant([1.0]))
    assert repr(name) in message and "rename" in message


# What a function gives


@pytest.mark.parametrize(
    "output",
    [
        [1.0, None, 0.5, -2],
        (1.0, None, 0.5, -2),
        [True, None, Fraction(1, 2), Decimal(-2)],
        [np.float32(1), None, np.bool_(True) / 2, np.int64(-2)],
        [torch.tensor(1.0), None, torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(-2)],
    ],
)
def test_all_kinds_of_numbers_and_none(output: Any):
    report = score_groups(RAGGED, [constant(output)], None)
    assert report.rewards == [[1.0, None, 0.5], [-2.0]]
    assert report.per_function == {"constant": [[1.0, None, 0.5], [-2.0]]}
    assert all(type(reward) in (float, type(None)) for rewards in report.rewards for reward in rewards)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_one_dimensional_tensors_and_arrays(make: Any):
    assert score_groups(RAGGED, [constant(make([1.0, 0.0, 0.5, -2.0]))], None).rewards == [[1.0, 0.0, 0.5], [-2.0]]
    assert score_groups(RAGGED, [constant(make([True, False, True, True]))], None).rewards == [[1.0, 0.0, 1.0], [1.0]]


def test_rewards_are_weighted_sums_over_the_functions_with_an_opinion():
    functions = [constant([1.0, 2.0, None, None], "first"), constant([10.0, None, 30.0, None], "second")]
    report = score_groups(RAGGED, functions, [0.5, -2.0])
    # 0.5*1 - 2*10, 0.5*2, -2*30, no opinion at all
    assert report.rewards == [[-19.5, 1.0, -60.0], [None]]
    assert report.per_function == {"first": [[1.0, 2.0, None], [None]], "second": [[10.0, None, 30.0], [None]]}


def test_the_default_weight_is_one_and_a_weight_of_zero_is_still_an_opinion():
    functions = [constant([1.0, 2.0, None, None], "first"), constant([10.0, None, 30.0, None], "second")]
    assert score_groups(RAGGED, functions, None).rewards == [[11.0, 2.0, 30.0], [None]]
    assert score_groups(RAGGED, functions, [0.0, 1.0]).rewards == [[10.0, 0.0, 30.0], [None]]


def test_no_groups_no_calls_and_no_functions_no_rewards():
    never = RewardFunction("never", lambda **kwargs: pytest.fail("called"))
    report = score_groups([], [never], None)
    assert (report.rewards, report.per_function, report.metrics, report.extra) == ([], {"never": []}, {}, {})
    assert score_groups(RAGGED, [], None).rewards == [[None, None, None], [None]]


# Logs


def test_metrics_are_averaged_and_extra_columns_kept_in_member_order():
    def first(*, completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra(column="upper", values=[text.upper() for text in completions[:1]])
        log_extra("upper", [text.upper() for text in completions[1:]])
        log_metric(name="hits", value=1)
        log_metric("hits", torch.tensor(4.0))
        log_metric("only", -1.0)
        return [0.0] * 4

    def second(*, log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("hits", 7.0)
        return [0.0] * 4

    report = score_groups(RAGGED, resolve_rewards([first, second]), None)
    assert report.metrics == {"hits": (1 + 4 + 7) / 3, "only": -1.0}
    assert report.extra == {"upper": ["A", "B", "C", "D"]}


def test_a_column_that_two_functions_log_names_them():
    async def logs(numbers: list[int], *, log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("seen", numbers)
        return [0.0] * 4

    both = [functools.partial(logs, [1, 2, 3, 4]), functools.partial(logs, [5, 6, 7, 8])]
    report = score_groups(RAGGED, resolve_rewards(both), None)
    assert report.extra == {"logs/seen": [1, 2, 3, 4], "logs_2/seen": [5, 6, 7, 8]}


def test_extra_columns_of_the_wrong_length_and_metrics_that_are_no_numbers_are_refused():
    short = RewardFunction("short", lambda log_extra, **kwargs: log_extra("seen", [1, 2, 3]) or [0.0] * 4)
    message = refusal(RAGGED, short)
    assert "'short' logged 3 values" in message and "'seen'" in message and "expected 4" in message
    message = refusal(RAGGED, RewardFunction("wordy", lambda log_metric, **kwargs: log_metric("hits", "many")))
    assert "'wordy' called log_metric('hits', ...) with 'many' (str)" in message


# TRL's own functions, unchanged


GOOD, BAD = "<think>two and two</think>4", "4"


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_functions_of_trl_run_unchanged_in_any_order(order: list[int]):
    # 12 tokens at most, of which the last 4 are punished: 10 tokens lie half-way in, so -(10 - 8) / 4.
    overlong = get_soft_overlong_punishment(max_completion_len=12, soft_punish_cache=4)
    # Bigrams of [5, 5, 5, 5]: one of three is new; of the ten different tokens: all are.
    repetition = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    functions = [think_format_reward, overlong, repetition]
    group = Group(chat("2+2?"), [Completion(GOOD, list(range(10))), Completion(BAD, [5, 5, 5, 5])])
    report = score_groups([group], resolve_rewards([functions[i] for i in order]), [[1.0, 2.0, 3.0][i] for i in order])
    assert report.per_function["think_format_reward"] == [[1.0, 0.0]]
    assert report.per_function["soft_overlong_punishment_reward"] == [[-0.5, 0.0]]
    assert report.per_function["repetition_penalty_reward"] == [[0.0, pytest.approx(-2 / 3)]]
    names = ["think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward"]
    assert list(report.per_function) == [names[i] for i in order]
    assert report.rewards == [[1.0 * 1.0 + 2.0 * -0.5, pytest.approx(3.0 * -2 / 3)]]


def test_a_length_reward_of_trl_needs_no_tokenizer():
    functions = resolve_rewards(get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=1))
    assert score_groups([id_group([1, 1], [1, 1, 1], [1, 1, 1, 1])], functions, None).rewards == [[0.0, -1.0, -1.0]]


# Asynchronous functions


async def slow(*, completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(ord(text)) for text in completions]


class AsyncJudge:
    async def __call__(self, **kwargs: Any) -> list[float]:
        return await slow(**kwargs)


def undeclared(**kwargs: Any) -> Any:
    return slow(**kwargs)


async def scaled(factor: float, **kwargs: Any) -> list[float]:
    return [factor * value for value in await slow(**kwargs)]


@pytest.mark.parametrize("function", [slow, AsyncJudge(), undeclared, functools.partial(scaled, 1.0)])
def test_all_forms_of_asynchronous_functions(function: Any):
    report = score_groups(RAGGED, resolve_rewards(function), None)
    assert report.rewards == [[97.0, 98.0, 99.0], [100.0]]  # code points of a, b, c, d


def test_asynchronous_functions_run_concurrently():
    barrier = asyncio.Barrier(2)

    async def meets(**kwargs: Any) -> list[float]:
        # Each goes on only when the other has come: one after the other, the first would wait for ever.
        async with asyncio.timeout(20):
            await barrier.wait()
        return [1.0] * 4

    report = score_groups(RAGGED, resolve_rewards([meets, meets]), None)
    assert report.rewards == [[2.0, 2.0, 2.0], [2.0]]


@pytest.mark.parametrize("swapped", [False, True])
def test_results_stay_with_their_functions_whatever_their_order(swapped: bool):
    ran: list[str] = []

    def plain(**kwargs: Any) -> list[float]:
        ran.append("plain")
        return [1.0, 2.0, 3.0, 4.0]

    async def awaited(**kwargs: Any) -> list[float]:
        ran.append("awaited")
        return [10.0, 20.0, 30.0, 40.0]

    functions = resolve_rewards([awaited, plain] if swapped else [plain, awaited])
    report = score_groups(RAGGED, functions, [5.0, 1.0] if swapped else [1.0, 5.0])
    assert report.per_function["plain"] == [[1.0, 2.0, 3.0], [4.0]]
    assert report.per_function["awaited"] == [[10.0, 20.0, 30.0], [40.0]]
    assert report.rewards == [[51.0, 102.0, 153.0], [204.0]]
    assert ran == ["plain", "awaited"]


def test_it_works_where_a_loop_already_runs_as_in_a_notebook():
    async def cell() -> Any:
        return score_groups(RAGGED, resolve_rewards(slow), None).rewards

    assert asyncio.run(cell()) == [[97.0, 98.0, 99.0], [100.0]]


def test_synchronous_functions_run_in_the_calling_thread():
    # Verifiers that set an alarm signal, such as math-verify, need the main thread.
    def here(**kwargs: Any) -> list[bool]:
        return [threading.current_thread() is caller] * 4

    caller = threading.current_thread()
    assert score_groups(RAGGED, resolve_rewards(here), None).rewards == [[1.0, 1.0, 1.0], [1.0]]


def test_a_failing_asynchronous_function_does_not_wait_for_the_others():
    async def waits(**kwargs: Any) -> list[float]:
        async with asyncio.timeout(20):
            await asyncio.Event().wait()
        return []

    async def fails(**kwargs: Any) -> list[float]:
        raise RuntimeError("judge is down")

    assert "'fails' raised RuntimeError: judge is down" in refusal(RAGGED, *resolve_rewards([waits, fails]))


def test_an_asynchronous_function_that_never_got_its_turn_leaves_no_warning():
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert "'fails' raised" in refusal(RAGGED, *resolve_rewards([slow, undeclared]), raising(RuntimeError("no")))
        gc.collect()
    assert not caught


# Refusals


def test_a_function_that_raises_is_named_with_type_message_and_line():
    def helper(text: str) -> float:
        return float(text)

    def fails(*, completions: list[str], **kwargs: Any) -> list[float]:
        return [helper(text) for text in completions]

    with pytest.raises(UserError) as caught:
        score_groups(RAGGED, resolve_rewards(fails), None)
    line = inspect.getsourcelines(helper)[1] + 1
    assert "reward function 'fails' raised ValueError: could not convert string to float: 'a'" in str(caught.value)
    assert f"({__file__}:{line})" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_messages_of_many_lines_become_one_and_long_ones_are_cut():
    message = refusal(RAGGED, raising(RuntimeError("first\n  second " + "x" * 1000)))
    # 300 characters: "first second ", and the cut shown by three dots
    assert f"RuntimeError: first second {'x' * (300 - 13 - 3)}... (" in message


def test_a_function_that_exits_does_not_end_the_run_quietly():
    assert "'fails' raised SystemExit: 0" in refusal(RAGGED, raising(SystemExit(0)))


def test_an_exception_without_text_and_a_user_error():
    assert re.search(r"raised AssertionError \(.*:\d+\)", refusal(RAGGED, raising(AssertionError())))
    assert refusal(RAGGED, raising(UserError("row 3: no answer"))) == "row 3: no answer"


@pytest.mark.parametrize("output", [[1.0] * 3, [1.0] * 5, (), torch.zeros(3)])
def test_a_wrong_number_of_values(output: Any):
    message = refusal(RAGGED, constant(output))
    assert f"'constant' returned {len(output)} values, expected 4" in message


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (None, "None (NoneType)"),
        (1.0, "1.0 (float)"),
        ("1111", "'1111' (str)"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "(dict)"),
        (torch.zeros(4, 1), "(Tensor of shape (4, 1))"),
        (np.float64(1), "(float64 of shape ())"),
        ((1.0 for _ in range(4)), "(generator)"),
    ],
)
def test_what_is_no_list(output: Any, shown: str):
    message = refusal(RAGGED, constant(output))
    assert "'constant' returned" in message and shown in message and "return a list" in message


@pytest.mark.parametrize(
    ("value", "shown"),
    [("0.5", "'0.5' (str)"), ([1.0], "[1.0] (list)"), (1j, "1j (complex)"), (torch.zeros(1), "(Tensor of shape (1,))")],
)
def test_a_value_that_is_no_number(value: Any, shown: str):
    message = refusal(RAGGED, constant([1.0, 1.0, 1.0, value]))
    assert shown in message and "'constant'" in message
    assert "value 3, group 1, member 0 (counted from 0)" in message


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32("inf"), "inf"),
        (torch.tensor(math.nan), "nan"),
        (10**400, "inf"),
    ],
)
def test_a_value_that_is_not_finite_names_function_prompt_and_completion(value: Any, shown: str):
    groups = [text_group("p", "a"), text_group("Why\n" + "q" * 200, "ok", "c" * 80 + "d")]
    message = refusal(groups, constant([1.0, 1.0, value]))
    assert f"'constant' returned {shown} as value 2, group 1, member 1" in message
    assert f"prompt 'Why {'q' * 73}...'" in message  # 4 + 73 + 3 = 80 characters
    assert f"completion '{'c' * 77}...'" in message


def test_chats_and_ids_are_excerpted_too():
    group = Group(chat("what is it"), [Completion("x" * 80)])
    assert f"prompt 'what is it', completion '{'x' * 80}'" in refusal([group], constant([math.nan]))
    assert "prompt ids [7, 8], completion ids [1, 2]" in refusal([id_group([1, 2])], constant([math.nan]))


def test_a_function_without_kwargs_is_told_to_add_them():
    strict = RewardFunction("strict", lambda completions, answer: [0.0])
    message = refusal([text_group("p", "a", answer="1", level=2)], strict)
    assert "reward function 'strict' does not take 'prompts', 'completion_ids', 'trainer_state', " in message
    assert "'level'" in message
    assert "add **kwargs" in message


def test_a_function_with_exactly_the_arguments_needs_no_kwargs():
    def full(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [1.0] * 4

    assert score_groups(RAGGED, resolve_rewards(full), None).rewards == [[1.0, 1.0, 1.0], [1.0]]


def test_a_wrapper_is_asked_what_it_takes_itself():
    @functools.wraps(lambda completions: None)
    def outer(**kwargs: Any) -> list[float]:
        return [1.0] * 4

    assert score_groups(RAGGED, resolve_rewards(outer), None).rewards == [[1.0, 1.0, 1.0], [1.0]]


def test_a_missing_column_is_named_with_the_nearest():
    needs = RewardFunction("needs", lambda solution, **kwargs: [0.0])
    message = refusal([text_group("p", "a", solutions="1")], needs)
    assert "'needs' needs 'solution'" in message and "did you mean 'solutions'?" in message
    assert "there is 'completion_ids', 'completions', " in refusal([text_group("p", "a")], needs)


def test_weights_must_fit():
    functions = [constant([1.0] * 4, "first"), constant([1.0] * 4, "second")]
    message = refusal(RAGGED, *functions, weights=[1.0])
    assert "reward_weights has 1 numbers for 2 reward functions (first, second)" in message
    assert "the weight of 'second' is nan" in refusal(RAGGED, *functions, weights=[1.0, math.nan])


def test_a_sum_that_overflows_is_refused():
    message = refusal(RAGGED, constant([1.0, 1.0, 1.0, 1e308]), weights=[10.0])
    assert "group 1, member 0" in message and "sum to inf" in message
