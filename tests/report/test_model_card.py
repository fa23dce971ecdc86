"""The model card: front matter that is YAML, and what the run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gvpo.objective import OBJECTIVES
from gvpo.report.model_card import hub_id, model_card
from gvpo.training.config import GVPOConfig

HISTORY = [
    {"update": 0, "eval/reward": 0.125},
    {"update": 1, "reward": 0.1},
    {"update": 2, "loss": 0.5},
    {"update": 3, "reward": 0.30001, "eval/reward": 0.5},
]


def card(base_model: str = "owner/name", dataset: str | None = None, **rest: Any) -> str:
    given: dict[str, Any] = {"settings": GVPOConfig().model_dump(), "history": HISTORY} | rest
    return model_card(base_model=base_model, dataset=dataset, **given)


def front_matter(text: str) -> dict[str, Any]:
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(card(dataset="owner/data:test")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gvpo", "reinforcement-learning", "text-generation"],
        "base_model": "owner/name",
        "datasets": ["owner/data"],
    }


@pytest.mark.parametrize(
    "name", ["", "./model", "/abs/model", "~/model", "runs/x/model", "a\nb: c/d", "x/y.gguf", "here", "a--b/c", "a/b:c"]
)
def test_what_cannot_be_a_hub_id_is_left_out(name: str) -> None:
    assert hub_id(name) is None
    assert "base_model" not in front_matter(card(base_model=name))


def test_a_folder_on_disk_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/model") == "runs/model"
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert hub_id("runs/model") is None


def test_the_embedded_model_has_its_name_on_the_hub() -> None:
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_value_that_yaml_would_misread_comes_back_as_it_was() -> None:
    assert front_matter(card(base_model="123/456"))["base_model"] == "123/456"


def test_settings_are_the_configs() -> None:
    text = card(settings=GVPOConfig(beta=0.25, learning_rate=3e-6, seed=77, reference="initial").model_dump())
    for line in (
        "| `beta` | `0.25` |",
        "| `learning_rate` | `3e-06` |",
        "| `seed` | `77` |",
        "| `reference` | `initial` |",
    ):
        assert line in text


def test_rewards_first_and_last() -> None:
    text = card()
    assert "| `reward`, mean over training completions | 0.1 (update 1) | 0.3 (update 3) |" in text
    assert "| `eval/reward`, mean over held-out prompts | 0.125 (update 0) | 0.5 (update 3) |" in text
    assert " in 3 updates" in text


def test_without_rewards_there_is_no_table_of_them() -> None:
    assert "## Rewards" not in card(history=[])
    assert "## Rewards" not in card(history=[{"update": 1, "reward": None}])


def test_a_name_cannot_break_out_of_its_place() -> None:
    text = card(base_model="x`|\n# Title", dataset="a`b\n---\nlicense: mit")
    assert "`x'/ # Title`, trained with" in text
    assert "`a'b --- license: mit`" in text


def test_another_objective_is_named_and_no_optimum_is_claimed() -> None:
    for name in OBJECTIVES:
        text = card(settings=GVPOConfig(objective=name).model_dump())
        assert f"| `objective` | `{name}` |" in text
        assert ("pi_ref * exp" in text) == ("Group Variance" in text) == ("arXiv" in text) == (name == "gvpo")


def test_the_paper_is_cited() -> None:
    text = card()
    assert "https://arxiv.org/abs/2504.19599" in text
    assert "eprint = {2504.19599}" in text and "year = {2025}" in text
    # Braces balance, or BibTeX reads past the entry.
    entry = text.split("```bibtex\n")[1].split("```")[0]
    assert entry.count("{") == entry.count("}")
