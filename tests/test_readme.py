"""The README's code and configs, as they are printed there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "training"))

from training_helpers import CHAT_TEMPLATE, letters_tokenizer, tiny_model

from gvpo.sources.dataset import read_rows
from gvpo.sources.mixture import Mixture
from gvpo.training.config import RunConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


def test_the_python_example_runs_on_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(max_position_embeddings=256).save_pretrained("tiny")
    letters_tokenizer(CHAT_TEMPLATE).save_pretrained("tiny")
    code = next(block for block in blocks("python") if "GVPOTrainer" in block)
    for printed, instead in ('"smollm2-135m"', '"tiny"'), ("max_steps=20", "max_steps=1"):
        assert printed in code
        code = code.replace(printed, instead)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert len(code.strip().splitlines()) <= 45


def test_the_configs_are_some() -> None:
    whole, sources = (RunConfig(**yaml.safe_load(block)) for block in blocks("yaml"))
    assert whole.reward_funcs and whole.train_dataset
    Mixture(tuple(sources.sources or ())).check(sources.num_generations, sources.groups_per_update)


def test_the_rows_are_a_dataset(tmp_path: Path) -> None:
    for block in blocks("jsonl"):
        (tmp_path / "rows.jsonl").write_text(block)
        assert read_rows(tmp_path / "rows.jsonl")
