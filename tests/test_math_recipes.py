"""The recipes for mathematics: their configs are valid, and the small one's problems have the answers that they say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from gvpo.rewards import math_accuracy
from gvpo.rewards.ready import BOUNDED, POOLED, READY
from gvpo.training.config import RunConfig, load_config

FOLDER = Path(__file__).parent.parent / "recipes" / "math"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.yaml")), ids=lambda path: path.name)
def test_configs_are_valid_and_say_where_each_value_is_from(path: Path) -> None:
    run = RunConfig(**load_config(path))
    assert run.reward_funcs in {**READY, **POOLED, **BOUNDED}
    settings = [line for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
    said = [line for line in settings if re.search(r"# (paper|script|ours)", line)]
    # Paths, and what is under the heading "ours", say nothing of their own.
    heading = path.read_text().partition("# Where time and memory go")[2].splitlines()
    assert set(settings) - set(said) <= {*heading, *[line for line in settings if line.startswith("output_dir")]}


def test_the_script_with_adapters_has_the_settings_of_the_config() -> None:
    script = loaded(FOLDER / "qwen2.5_math_7b_lora.py").config
    run = RunConfig(**load_config(FOLDER / "qwen2.5-math-1.5b.yaml"))
    same = ("beta", "num_generations", "groups_per_update", "updates_per_rollout", "num_train_epochs", "reference")
    for name in (*same, "max_completion_length", "lr_scheduler_type", "weight_decay", "max_grad_norm"):
        assert getattr(script, name) == getattr(run, name), name


class TestSmallProblems:
    @pytest.fixture
    def problems(self) -> ModuleType:
        pytest.importorskip("reasoning_gym")
        return loaded(FOLDER / "small" / "problems.py")

    @pytest.mark.parametrize(
        ("kind", "numbers", "answer"),
        [
            ("buys_and_gives", (5, 3, 2), 6),
            ("buys_and_gives", (2, 2, 9), 0),  # nobody gives more than there is
            ("boxes_and_more", (5, 3, 2), 11),
            ("loses_and_finds", (5, 3, 2), 7),  # 8 - 3 + 2
            ("bags_and_taken", (5, 3, 2), 1),
            ("bags_and_taken", (20, 2, 2), 0),
        ],
    )
    def test_answers_by_hand(self, problems: ModuleType, kind: str, numbers: tuple[int, int, int], answer: int) -> None:
        row = problems.row(*getattr(problems, kind)("Ana", "pens", *numbers))
        assert row["answers"] == [str(answer)] and "Ana" in row["problem"]
        assert row["solution"].endswith(f"= {answer}. \\boxed{{{answer}}}")

    def test_steps_by_hand(self, problems: ModuleType) -> None:
        assert problems.steps(46, ("+", 12), ("-", 90)) == ["46 + 12 = 58", "58 - 90 = -32"]
        assert problems.steps(3, ("*", 7)) == ["3 * 7 = 21"]

    def test_sums_have_the_answers_of_their_task(self, problems: ModuleType) -> None:
        import reasoning_gym

        size = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
        entries = reasoning_gym.create_dataset("chain_sum", seed=3, size=200, **size)
        rows = [problems.row(*made) for made in problems.sums(3, 200)]
        assert [(row["problem"], row["answers"]) for row in rows] == [
            (entry["question"], [entry["answer"]]) for entry in entries
        ]

    def test_solutions_hold_line_by_line_and_are_scored_right(self, problems: ModuleType) -> None:
        made = [*problems.sums(5, 100), *problems.two_step(5, 100)]
        for _, steps in made:
            for step in steps:
                terms, _, result = step.partition(" = ")
                assert re.fullmatch(r"-?\d+ [-+*] \d+", terms) and eval(terms) == int(result)
        rows = [problems.row(*one) for one in made]
        scores = math_accuracy(completions=[row["solution"] for row in rows], answers=[row["answers"] for row in rows])
        assert scores == [1.0] * 200

    def test_files_are_apart_and_the_same_again(
        self, problems: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = []
        for name in ("one", "two"):
            monkeypatch.setattr("sys.argv", ["problems.py", str(tmp_path / name), "--train", "60", "--held_out", "20"])
            problems.main()
            written.append({file.name: file.read_text() for file in (tmp_path / name).iterdir()})
        assert written[0] == written[1] and sorted(written[0]) == ["sums.jsonl", "train.jsonl", "two-step.jsonl"]
        rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in written[0].items()}
        assert {name: len(found) for name, found in rows.items()} == {
            "sums.jsonl": 20,
            "train.jsonl": 60,
            "two-step.jsonl": 20,
        }
        every = [row["problem"] for found in rows.values() for row in found]
        assert len(set(every)) == len(every)
        # The sums of reasoning-gym, computed anew.
        for row in rows["sums.jsonl"]:
            assert eval(row["problem"].partition(":")[2].strip(" =")) == int(row["answers"][0])
