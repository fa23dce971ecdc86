"""Datasets become rows: every form that is taken, every mistake in one line, and the order of the prompts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from training_helpers import END, first_token, offline_groups, prompts, run, tiny_model

from gvpo.errors import UserError
from gvpo.group_files import write_groups
from gvpo.groups import Completion, Group
from gvpo.sources.dataset import PromptOrder, read_rows

CHAT = [{"role": "user", "content": "Hello"}]


def lines(tmp_path: Path, *rows: Any) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def refusal(data: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(data, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Forms


def test_rows_with_a_prompt_alone() -> None:
    one, two = read_rows([{"prompt": "2+2?", "answer": 4}, {"prompt": CHAT, "answer": None}])
    assert (one.prompt, one.columns, one.completions) == ("2+2?", {"answer": 4}, ())
    assert (two.prompt, two.columns) == (CHAT, {"answer": None})
    assert not one.offline and not one.has_rewards


def test_rows_with_token_ids() -> None:
    (row,) = read_rows([{"prompt_ids": [1, 2]}])
    assert (row.prompt, row.prompt_ids) == (None, [1, 2])


def test_offline_rows() -> None:
    (row,) = read_rows([{"prompt": "p", "completions": ["a", "b"], "rewards": [1, None], "answer": 4}])
    assert row.offline and row.has_rewards
    assert [(c.text, c.reward, c.source) for c in row.completions] == [("a", 1.0, "dataset"), ("b", None, "dataset")]
    assert row.columns == {"answer": 4}


@pytest.mark.parametrize("rewards", [{}, {"rewards": None}, {"rewards": [None, None]}])
def test_offline_rows_without_rewards(rewards: dict[str, Any]) -> None:
    (row,) = read_rows([{"prompt": "p", "completions": ["a", "b"], **rewards}])
    assert row.offline and not row.has_rewards


def test_a_dataset_of_the_datasets_library_fills_gaps_with_none() -> None:
    data = datasets.Dataset.from_list(
        [{"prompt": "q", "n": 2, "completions": ["a", "b"], "rewards": [0.5, 1.0]}, {"prompt": "p", "n": 1}]
    )
    two, one = read_rows(data)
    assert not one.offline and one.columns == {"n": 1}
    assert two.offline and [c.reward for c in two.completions] == [0.5, 1.0] and two.columns == {"n": 2}


def test_groups_as_they_are() -> None:
    group = Group("p", [Completion("a", reward=1.0, source="teacher"), Completion("b")], id="g", columns={"n": 1})
    (row,) = read_rows([group])
    assert row.group() == group
    assert row.completions[0].source == "teacher"


def test_a_rows_group_shares_nothing_that_training_changes() -> None:
    group = Group("p", [Completion("a", [1], meta={"k": 1}), Completion("b", [2])], prompt_ids=[1], columns={"n": 1})
    made = read_rows([group])[0].group()
    made.completions[0].reward, made.completions[0].meta["rewards"], made.columns["m"] = 1.0, {}, 2
    made.completions.pop()
    assert made.prompt_ids is not None
    made.prompt_ids.append(9)
    assert group == Group(
        "p", [Completion("a", [1], meta={"k": 1}), Completion("b", [2])], prompt_ids=[1], columns={"n": 1}
    )


def test_equal_prompts_stay_two_groups() -> None:
    row = {"prompt": "p", "completions": ["a", "b"], "rewards": [0, 1]}
    assert len(read_rows([row, row])) == 2


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    groups = offline_groups(3)
    for name in ("groups.jsonl", "groups.parquet"):
        write_groups(groups, tmp_path / name)
        assert [row.group() for row in read_rows(tmp_path / name)] == groups
    file = lines(tmp_path, {"prompt": "p", "n": 1}, "", {"prompt": "q", "n": 2})
    assert [(row.prompt, row.columns, row.where) for row in read_rows(file)] == [
        ("p", {"n": 1}, f"{file}, line 1"),
        ("q", {"n": 2}, f"{file}, line 3"),
    ]
    parquet = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"prompt": "p", "n": 1}]).to_parquet(parquet)
    assert [(row.prompt, row.columns) for row in read_rows(parquet)] == [("p", {"n": 1})]


def test_prompt_column() -> None:
    data = [{"question": "p", "n": 1}]
    (row,) = read_rows(data, prompt_column="question")
    assert row.prompt == "p" and row.columns == {"question": "p", "n": 1}
    message = refusal(data)
    assert message.startswith("train_dataset, row 1, field 'prompt'") and "question, n" in message
    assert "prompt_column" in message
    (offline,) = read_rows([{"question": "p", "completions": ["a", "b"]}], prompt_column="question")
    assert offline.prompt == "p"


def test_prompt_column_wins_over_prompt() -> None:
    (row,) = read_rows([{"prompt": "template", "question": "p"}], prompt_column="question")
    assert row.prompt == "p"


# Mistakes: file, line, field


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "p"}, "field 'prompt': missing"),
        ({"prompt": None}, "field 'prompt': missing"),
        ({"prompt": 7}, "field 'prompt'"),
        ({"prompt": []}, "field 'prompt'"),
        ({"prompt": [{"content": "no role"}]}, "field 'prompt[0].role'"),
        ({"prompt_ids": []}, "field 'prompt_ids'"),
        ({"prompt_ids": [-1]}, "field 'prompt_ids[0]'"),
        ({"prompt": "p", "completions": ["a"], "rewards": [1]}, "field 'completions': 1 completion"),
        ({"prompt": "p", "completions": [{"text": "a"}]}, "field 'completions': 1 completion"),
        ({"prompt": "p", "completions": []}, "field 'completions'"),
        ({"prompt": "p", "completions": "ab"}, "field 'completions'"),
        ({"prompt": "p", "completions": ["a", 3]}, "field 'completions[1]'"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1]}, "field 'rewards': 1 reward for 2 completions"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1, "x"]}, "field 'rewards[1]'"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1, float("nan")]}, "non-finite"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1, float("inf")]}, "non-finite"),
        ({"prompt": "p", "rewards": [1]}, "field 'rewards': given without 'completions'"),
        (["p"], "expected an object"),
        ('{"prompt": "p"', "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, says: str) -> None:
    file = lines(tmp_path, {"prompt": "fine"}, row)
    message = refusal(file)
    assert message.startswith(f"{file}, line 2") and says in message


def test_wrong_rows_of_a_list_and_of_parquet_are_counted_from_one(tmp_path: Path) -> None:
    assert refusal([{"prompt": "p"}, {}]).startswith("train_dataset, row 2, ")
    assert refusal([{"prompt": "p"}, {}], name="eval_dataset").startswith("eval_dataset, row 2, ")
    parquet = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"prompt": "p"}, {"prompt": None}]).to_parquet(parquet)
    assert refusal(parquet).startswith(f"{parquet}, row 2, field 'prompt'")


def test_an_id_is_for_one_draw(tmp_path: Path) -> None:
    pair = {"id": "a", "completions": [{"text": "x", "reward": 0}, {"text": "y", "reward": 1}]}
    file = lines(tmp_path, pair | {"prompt": "p"}, pair | {"prompt": "p", "id": "b"}, pair | {"prompt": "p"})
    assert refusal(file).startswith(f"{file}, line 3, field 'id': 'a' is the id of another group too ({file}, line 1)")
    file = lines(tmp_path, pair | {"prompt": "p"}, pair | {"prompt": "q"})
    assert "another group too, with another prompt" in refusal(file)
    # The id of a prompt that groups are drawn for is a column like any other.
    assert len(read_rows([{"prompt": "p", "id": "a"}] * 2)) == 2


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "no rows" in refusal([])
    assert "no rows" in refusal(lines(tmp_path))
    assert "no such file" in refusal(str(tmp_path / "none.jsonl"))
    assert "expected a dataset" in refusal(7)
    (tmp_path / "data.csv").write_text("prompt\np\n")
    assert ".jsonl or .parquet" in refusal(str(tmp_path / "data.csv"))


# Through the trainer


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_columns_reach_the_reward_functions(make: Any) -> None:
    seen = []

    def reward(completion_ids: list[list[int]], target: list[int], **kwargs: Any) -> list[float]:
        seen.extend(zip(target, kwargs["name"], strict=True))
        return [0.0] * len(completion_ids)

    rows = [{"prompt_ids": [n + 1], "target": n, "name": str(n)} for n in range(4)]
    run(tiny_model(), make(rows), reward, max_steps=2, updates_per_rollout=2)
    assert sorted(seen) == [(n, str(n)) for n in range(4) for _ in range(3)]


def test_training_never_changes_groups() -> None:
    groups = offline_groups(4)
    groups[1].completions[0].reward = None
    groups += [Group(None, [Completion(None, [1, END]), Completion(None, [2, END])], prompt_ids=[3])]
    before = copy.deepcopy(groups)
    run(tiny_model(), groups, first_token, num_train_epochs=2, max_steps=None)
    assert groups == before


def test_training_never_changes_rows() -> None:
    rows = [{"prompt_ids": [1], "notes": ["a"]}, {"prompt_ids": [2], "notes": ["b"]}]
    before = copy.deepcopy(rows)

    def greedy_for_arguments(completion_ids: list[list[int]], notes: list[list[str]], **kwargs: Any) -> list[float]:
        for note in notes:
            note.append("changed")
        return first_token(completion_ids)

    run(tiny_model(), rows, greedy_for_arguments)
    assert rows == before


def test_groups_with_equal_prompts_are_not_merged() -> None:
    one, two = offline_groups(2, sizes=(2,))
    two.prompt_ids = one.prompt_ids
    history = run(tiny_model(), [one, two], max_steps=1, updates_per_rollout=1).history
    assert history[0]["groups"] == 2


# Order


def taken(order: PromptOrder, start: int, count: int) -> list[Any]:
    return [row.prompt for row in order.take(start, count)]


def order_of(count: int, seed: int, *, shuffle: bool = True) -> PromptOrder:
    return PromptOrder(read_rows([{"prompt": str(n)} for n in range(count)]), seed, shuffle=shuffle)


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [taken(order_of(20, seed=1), start, 20) for start in (0, 20, 40)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(n) for n in range(20)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_a_function_of_the_seed() -> None:
    assert taken(order_of(20, seed=1), 0, 60) == taken(order_of(20, seed=1), 0, 60)
    assert taken(order_of(20, seed=1), 0, 20) != taken(order_of(20, seed=2), 0, 20)


def test_a_later_start_goes_on_where_an_earlier_one_stopped() -> None:
    whole = taken(order_of(7, seed=3), 0, 30)
    order = order_of(7, seed=3)
    assert taken(order, 0, 5) + taken(order, 5, 25) == whole
    assert taken(order_of(7, seed=3), 11, 19) == whole[11:]


def test_a_short_dataset_is_cycled() -> None:
    drawn = taken(order_of(3, seed=0), 0, 8)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["0", "1", "2"] and len(drawn) == 8


def test_without_shuffling_rows_come_in_order() -> None:
    assert taken(order_of(3, seed=0, shuffle=False), 0, 5) == ["0", "1", "2", "0", "1"]


def test_a_short_dataset_trains() -> None:
    trainer = run(tiny_model(), prompts(1), first_token, max_steps=2)
    assert [row["groups"] for row in trainer.history] == [2, 2]


def test_several_splits_are_not_one_dataset() -> None:
    with pytest.raises(UserError, match="a mapping of train, test; give one split"):
        read_rows({"train": [{"prompt": "a"}], "test": []})
