"""The demo's task, its reward, and what it dares to remove. The demo itself is run by hand: `make demo`."""

from __future__ import annotations

from pathlib import Path

import pytest

from gvpo.cli.demo import HELD_OUT, _clear, brevity, demo_config, make_task
from gvpo.errors import UserError
from gvpo.training.config import GVPOConfig, dump_config


def numbers(row: dict) -> frozenset[int]:
    return frozenset(int(text) for text in row["prompt"][-1]["content"].partition(": ")[2].split(", "))


def test_no_held_out_pair_is_trained_on() -> None:
    train, held_out = make_task(seed=0)
    assert len(train) == 2000 and len(held_out) == HELD_OUT == 200
    assert not {numbers(row) for row in train} & {numbers(row) for row in held_out}
    for row in [*train, *held_out]:
        assert row["answer"] == str(max(numbers(row)))
    first = [row["prompt"][-1]["content"].partition(": ")[2].startswith(row["answer"]) for row in train]
    assert 0.45 < sum(first) / len(first) < 0.55  # the place of the larger number tells nothing


def test_seeds_make_other_tasks() -> None:
    assert make_task(seed=0) == make_task(seed=0) != make_task(seed=1)


def test_brevity_is_the_share_of_the_answer_that_is_the_number() -> None:
    texts = ["63", "63.", "The larger number is 63", "61", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert brevity(completions=completions, answer=["63"] * 5) == [1.0, 2 / 3, 2 / 23, 0.0, 0.0]


def test_a_demo_of_before_is_removed_and_nothing_else(tmp_path: Path) -> None:
    _clear(tmp_path / "none")
    _clear(tmp_path)  # empty
    demo, other, file = tmp_path / "demo", tmp_path / "other", tmp_path / "file"
    for folder, config in ((demo, demo_config(0, str(demo))), (other, GVPOConfig(output_dir=str(other)))):
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "metrics.jsonl").write_text("{}\n")
    file.write_text("mine")
    _clear(demo)
    assert not demo.exists()
    for path in (other, file):
        with pytest.raises(UserError, match="not a demo's"):
            _clear(path)
    assert len(list(other.iterdir())) == 2 and file.read_text() == "mine"
