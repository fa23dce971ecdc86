"""The data model: what a group accepts, how it normalises it, and what it says to a mistake."""

from __future__ import annotations

import ast
import math
import pickle
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gvpo.group_files
import gvpo.groups
from gvpo.errors import UserError
from gvpo.groups import Completion, FieldError, Group, group_from_dict, group_to_dict


def pair(**kwargs: Any) -> Group:
    return Group("p", [Completion("a"), Completion("b")], **kwargs)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


def test_defaults_are_the_public_contract() -> None:
    completion = Completion("a")
    assert (completion.text, completion.token_ids, completion.reward, completion.source) == ("a", None, None, "policy")
    assert (completion.ref_logprob, completion.truncated, completion.loss_mask) == (None, False, None)
    assert completion.meta == {}
    group = Group("p", [completion])
    assert (group.prompt, group.completions, group.prompt_ids, group.id) == ("p", [completion], None, None)
    assert group.columns == {}


def test_all_but_the_first_two_arguments_are_keywords() -> None:
    assert Completion("a", [1]).token_ids == [1]
    construct: Any = Completion
    with pytest.raises(TypeError, match="positional"):
        construct("a", [1], 0.5)
    construct = Group
    with pytest.raises(TypeError, match="positional"):
        construct("p", [Completion("a")], [1])


def test_equality_is_by_value_and_fields_can_be_assigned() -> None:
    first, second = pair(id="x", columns={"a": [1]}), pair(id="x", columns={"a": [1]})
    assert first == second
    second.completions[1].reward = 0.5
    assert first != second
    assert (second.k, second.rewards) == (2, [None, 0.5])


def test_replicated_members_are_kept_and_one_member_is_legal() -> None:
    assert Group("p", [Completion("a")] * 3).k == 3
    assert Group("p", [Completion("a")]).k == 1


def test_arguments_are_copied() -> None:
    ids, meta, members, columns, prompt = [1, 2], {"a": 1}, [Completion("a")], {"b": 2}, [{"role": "u", "content": "c"}]
    completion, group = Completion(token_ids=ids, meta=meta), Group(prompt, members, columns=columns)
    ids.append(3)
    meta["a"] = 2
    members.append(Completion("b"))
    columns["b"] = 3
    prompt[0]["content"] = "d"
    assert (completion.token_ids, completion.meta) == ([1, 2], {"a": 1})
    assert (group.k, group.columns, group.prompt) == (1, {"b": 2}, [{"role": "u", "content": "c"}])


@pytest.mark.parametrize(
    "ids",
    [
        [0, 5, 2**63 - 1],
        (0, 5, 2**63 - 1),
        np.array([0, 5, 2**63 - 1]),
        torch.tensor([0, 5, 2**63 - 1]),
        [np.int64(0), torch.tensor(5), np.uint64(2**63 - 1)],
    ],
    ids=["list", "tuple", "numpy", "torch", "scalars"],
)
def test_token_ids_become_a_plain_list(ids: Any) -> None:
    for kept in (Completion(token_ids=ids).token_ids, Group(None, [Completion("a")], prompt_ids=ids).prompt_ids):
        assert kept is not None
        assert type(kept) is list
        assert kept == [0, 5, 9223372036854775807]
        assert {type(token) for token in kept} == {int}


def test_an_empty_answer_is_an_answer() -> None:
    assert Completion("").text == ""
    assert Completion(token_ids=[]).token_ids == []


@pytest.mark.parametrize("bad", [True, 1.0, -1, 2**63, "1", None, np.True_, np.float32(1), torch.tensor(True), [1]])
@pytest.mark.parametrize("name", ["token_ids", "prompt_ids"])
def test_refuses_what_is_no_token_id(name: str, bad: Any) -> None:
    def construct() -> object:
        ids = [0, bad]
        return Completion(token_ids=ids) if name == "token_ids" else Group("p", [Completion("a")], prompt_ids=ids)

    assert message(construct).startswith(f"field '{name}[1]': expected an integer from 0 to 2^63 - 1, got ")


@pytest.mark.parametrize("bad", ["12", 3, {1: 2}, torch.tensor(3), iter([1])])
def test_refuses_token_ids_that_are_no_list(bad: Any) -> None:
    assert message(lambda: Completion(token_ids=bad)).startswith(
        "field 'token_ids': expected a list of token ids, got "
    )


def test_refuses_a_matrix_of_token_ids() -> None:
    problem = "expected an integer from 0 to 2^63 - 1, got list"
    assert message(lambda: Completion(token_ids=torch.tensor([[1, 2]]))) == (f"field 'token_ids[0]': {problem}")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.bool_(False), 0.0),
        (-0.25, -0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(2, requires_grad=False), 2.0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (Fraction(1, 4), 0.25),
    ],
)
def test_rewards_become_floats(number: Any, expected: float) -> None:
    reward = Completion("a", reward=number).reward
    assert type(reward) is float
    assert reward == expected


@pytest.mark.parametrize("name", ["reward", "ref_logprob"])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (10**400, "inf"),
        (np.float32("nan"), "nan"),
        (torch.tensor(math.inf), "inf"),
    ],
)
def test_refuses_non_finite_numbers(name: str, bad: Any, shown: str) -> None:
    problem = f"{shown} is non-finite; give a finite number or null (None)"
    assert message(lambda: Completion("a", **{name: bad})) == f"field '{name}': {problem}"


@pytest.mark.parametrize("name", ["reward", "ref_logprob"])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [("1.0", "'1.0' (str)"), ([1.0], "list"), (1j, "complex"), (np.array([1.0]), "ndarray"), ({}, "dict")],
)
def test_refuses_what_is_no_number(name: str, bad: Any, shown: str) -> None:
    problem = f"expected a number, got {shown}; give a finite number or null (None)"
    assert message(lambda: Completion("a", **{name: bad})) == f"field '{name}': {problem}"


@pytest.mark.parametrize("bad", [True, np.True_])
def test_a_truth_value_is_no_log_probability(bad: Any) -> None:
    assert message(lambda: Completion("a", ref_logprob=bad)).startswith("field 'ref_logprob': expected a log-prob")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "field 'text': neither 'text' nor 'token_ids' is given; give at least one"),
        ({"text": 3}, "field 'text': expected a string, got 3 (int)"),
        ({"text": "ab\ud83d"}, "field 'text': half of a surrogate pair at character 3; remove it"),
        (
            {"text": "a", "source": ""},
            "field 'source': empty; name where the completion came from, such as 'policy' or",
        ),
        ({"text": "a", "source": None}, "field 'source': expected a string, got None"),
        ({"text": "a", "truncated": 1}, "field 'truncated': expected true or false, got 1 (int)"),
        ({"text": "a", "truncated": None}, "field 'truncated': expected true or false, got None"),
        ({"text": "a", "meta": [1]}, "field 'meta': expected an object with string keys, got list"),
        ({"text": "a", "meta": {1: 2}}, "field 'meta': expected string keys, got 1 (int)"),
        ({"text": "a", "loss_mask": [True]}, "field 'loss_mask': given without 'token_ids'"),
        (
            {"token_ids": [1, 2], "loss_mask": [True]},
            "field 'loss_mask': 1 entry for 2 tokens; give one boolean per token of 'token_ids'",
        ),
        ({"token_ids": [1], "loss_mask": [1]}, "field 'loss_mask[0]': expected true or false, got 1 (int)"),
        ({"token_ids": [1], "loss_mask": True}, "field 'loss_mask': expected a list of booleans, got True"),
    ],
)
def test_refuses_wrong_completions(fields: dict[str, Any], expected: str) -> None:
    assert message(lambda: Completion(**fields)).startswith(expected)


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([True, False]), torch.tensor([True, False]), [np.True_, np.False_]]
)
def test_loss_masks_become_plain_booleans(mask: Any) -> None:
    kept = Completion(token_ids=[1, 2], loss_mask=mask, truncated=np.True_)
    assert kept.loss_mask is not None
    assert [value is expected for value, expected in zip(kept.loss_mask, [True, False], strict=True)] == [True, True]
    assert kept.truncated is True


ONE = [Completion("a")]


@pytest.mark.parametrize(
    ("prompt", "completions", "fields", "expected"),
    [
        (None, ONE, {}, "field 'prompt': missing; give a string, a list of chat messages, or 'prompt_ids'"),
        (3, ONE, {}, "field 'prompt': expected a list of chat messages (or give a string), got 3 (int)"),
        ([], ONE, {}, "field 'prompt': an empty list"),
        (["hi"], ONE, {}, "field 'prompt[0]': expected a message with 'role' and 'content', got 'hi' (str)"),
        ([{"content": "c"}], ONE, {}, "field 'prompt[0].role': expected a string, got None"),
        ([{"role": 1, "content": "c"}], ONE, {}, "field 'prompt[0].role': expected a string, got 1 (int)"),
        (
            [{"role": "user", "content": "c"}, {"role": "user"}],
            ONE,
            {},
            "field 'prompt[1].content': missing; a message has a 'role' and a 'content'",
        ),
        ("\udc00", ONE, {}, "field 'prompt': half of a surrogate pair at character 1"),
        ([{"role": "u", "content": "\udc00"}], ONE, {}, "field 'prompt[0].content': half of a surrogate pair"),
        ("p", [], {}, "field 'completions': an empty list; give at least one entry, or drop the row"),
        ("p", "ab", {}, "field 'completions': expected a list of completions, got 'ab' (str)"),
        ("p", iter(ONE), {}, "field 'completions': expected a list of completions, got list_iterator"),
        ("p", [*ONE, {"text": "b"}], {}, "field 'completions[1]': expected Completion(...), got dict; make it one"),
        ("p", ["b"], {}, "field 'completions[0]': expected Completion(...), got 'b' (str); make it one"),
        ("p", ONE, {"prompt_ids": []}, "field 'prompt_ids': an empty list"),
        ("p", ONE, {"id": 7}, "field 'id': expected a string, got 7 (int)"),
        ("p", ONE, {"columns": "x"}, "field 'columns': expected an object with string keys, got 'x' (str)"),
        ("p", ONE, {"columns": {None: 1}}, "field 'columns': expected string keys, got None"),
    ],
)
def test_refuses_wrong_groups(prompt: Any, completions: Any, fields: dict[str, Any], expected: str) -> None:
    assert message(lambda: Group(prompt, completions, **fields)).startswith(expected)


def test_accepts_chat_prompts_with_any_content() -> None:
    prompt = [{"role": "user", "content": None, "name": "x"}, {"role": "tool", "content": [{"type": "text"}]}]
    assert Group(prompt, ONE).prompt == prompt
    assert Group(None, ONE, prompt_ids=[1]).prompt is None


def test_long_values_are_cut_in_messages() -> None:
    assert len(message(lambda: Completion("a", reward="x" * 10_000))) < 150


def test_groups_and_their_errors_pass_between_processes() -> None:
    group = pair(id="x", prompt_ids=[1])
    assert pickle.loads(pickle.dumps(group)) == group
    error = pickle.loads(pickle.dumps(FieldError("reward", "wrong")))
    assert (type(error), error.field, error.problem) == (FieldError, "reward", "wrong")
    assert str(error) == "field 'reward': wrong"


def test_a_row_leaves_out_what_is_at_its_default() -> None:
    assert group_to_dict(Group("p", [Completion("")])) == {"prompt": "p", "completions": [{"text": ""}]}
    assert group_to_dict(Group(None, [Completion(token_ids=[])], prompt_ids=[1])) == {
        "prompt_ids": [1],
        "completions": [{"token_ids": []}],
    }


def test_a_row_holds_every_field_that_is_set() -> None:
    fields = {
        "text": "a",
        "token_ids": [5, 2],
        "reward": 0.0,
        "source": "teacher",
        "ref_logprob": -1.5,
        "truncated": True,
        "loss_mask": [False, True],
        "meta": {"a": {"b": [None]}},
    }
    row = {
        "id": "q1",
        "prompt": [{"role": "user", "content": "hi"}],
        "prompt_ids": [1, 2],
        "completions": [fields, {"text": "b"}],
        "columns": {"answer": "4"},
    }
    group = Group(
        [{"role": "user", "content": "hi"}],
        [Completion(**fields), Completion("b")],
        prompt_ids=[1, 2],
        id="q1",
        columns={"answer": "4"},
    )
    assert group_to_dict(group) == row
    assert group_from_dict(row) == group


def test_fields_assigned_after_construction_are_checked_on_the_way_out() -> None:
    group = pair()
    group.completions[1].reward = math.nan
    assert message(lambda: group_to_dict(group)).startswith("field 'completions[1].reward': nan is non-finite")
    group.completions[1] = "text"
    assert message(lambda: group_to_dict(group)).startswith("field 'completions[1]': expected Completion(...), got 'te")


def test_only_groups_become_rows_and_only_mappings_become_groups() -> None:
    assert message(lambda: group_to_dict({"prompt": "p"})).startswith("expected a Group, got dict")
    assert message(lambda: group_from_dict([1])).startswith("expected an object with 'prompt' and 'compl")


def test_null_is_a_field_left_out() -> None:
    nulls = dict.fromkeys(["token_ids", "reward", "source", "ref_logprob", "truncated", "loss_mask", "meta"])
    row = {"id": None, "prompt": "p", "prompt_ids": None, "completions": [{"text": "a"} | nulls], "columns": None}
    assert group_from_dict(row) == Group("p", [Completion("a")])


def test_a_dataset_row_keeps_its_further_columns() -> None:
    row = {"prompt": "p", "completions": ["a", "b", "a"], "rewards": [1, None, 0.5], "answer": None, "id": 7}
    completions = [Completion(t, reward=r, source="dataset") for t, r in (("a", 1.0), ("b", None), ("a", 0.5))]
    assert group_from_dict(row) == Group("p", completions, columns={"answer": None, "id": 7})
    assert row["rewards"] == [1, None, 0.5]


def test_a_dataset_row_needs_no_rewards_and_may_carry_prompt_ids() -> None:
    expected = Group(None, [Completion("a", source="dataset")], prompt_ids=[3])
    assert group_from_dict({"prompt_ids": [3], "completions": ["a"]}) == expected
    assert group_from_dict({"prompt_ids": np.array([3]), "completions": ["a"], "rewards": None}) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"completions": ["a"]}, "field 'prompt': missing; give a string, a list of chat messages, or 'prompt_ids'"),
        ({"completions": [{"text": "a"}]}, "field 'prompt': missing; give a string, a list of chat messages, or"),
        ({"prompt": "p"}, "field 'completions': missing; give a list of strings or of objects"),
        ({"prompt": "p", "completions": "a"}, "field 'completions': expected a list of strings or of objects, got 'a'"),
        ({"prompt": "p", "completions": []}, "field 'completions': an empty list"),
        ({"prompt": "p", "completions": [1]}, "field 'completions[0]': expected a string or an object, got 1 (int)"),
        (
            {"prompt": "p", "completions": ["a", {"text": "b"}]},
            "field 'completions[1]': expected the same kind as completions[0], got dict",
        ),
        (
            {"prompt": "p", "completions": [{"text": "b"}, None]},
            "field 'completions[1]': expected the same kind as completions[0], got None",
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 2]},
            "field 'rewards': 2 rewards for 3 completions; give one number or null per completion",
        ),
        (
            {"prompt": "p", "completions": ["a"], "rewards": []},
            "field 'rewards': 0 rewards for 1 completion; give one number or null per completion",
        ),
        (
            {"prompt": "p", "completions": ["a"], "rewards": 1},
            "field 'rewards': expected a list of numbers, got 1 (int",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "rewards": [1, "2"]},
            "field 'rewards[1]': expected a number, got '2' (str); give a finite number or null (None)",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1, math.nan]}, "field 'rewards[1]': nan is non-finite"),
        ({"prompt": "p", "completions": ["a", "\ud83d"]}, "field 'completions[1]': half of a surrogate pair"),
        (
            {"prompt": "p", "completions": [{"text": "a"}], "rewards": [1]},
            "field 'rewards': the completions are objects; give each its own 'reward' instead",
        ),
        (
            {"prompt": "p", "completions": [{"text": "a", "rewrd": 1}]},
            "field 'completions[0].rewrd': unknown; the nearest valid name is 'reward' (of text, token_ids, reward, ",
        ),
        (
            {"prompt": "p", "completions": [{"text": "a", "logprob": 1}]},
            "field 'completions[0].logprob': unknown; the nearest valid name is 'ref_logprob'",
        ),
        (
            {"prompt": "p", "completions": [{"text": "a"}], "colums": {}},
            "field 'colums': unknown; the nearest valid name is 'columns' (of prompt, completions, prompt_ids, id, "
            "columns); further columns go inside 'columns'",
        ),
        (
            {"prompt": "p", "completions": [{"text": "a"}, {"text": "b", "reward": math.inf}]},
            "field 'completions[1].reward': inf is non-finite",
        ),
        (
            {"prompt": "p", "completions": [{"reward": 1}]},
            "field 'completions[0].text': neither 'text' nor 'token_ids'",
        ),
    ],
)
def test_refuses_wrong_rows(row: dict[str, Any], expected: str) -> None:
    assert message(lambda: group_from_dict(row)).startswith(expected)


@pytest.mark.parametrize("module", [gvpo.groups, gvpo.group_files])
def test_importing_needs_the_standard_library_alone(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gvpo"}
    assert len(names) > 5
    assert foreign == set()
