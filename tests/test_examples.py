"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import yaml
from training_helpers import letters_tokenizer, tiny_model

from gvpo.training.config import RunConfig

ROOT = Path(__file__).parents[1]


def test_minimal_trains_a_model_from_a_folder(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=128).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "minimal.py"))["main"]
    means = main(str(tmp_path), 2)
    assert len(means) == 2
    assert means == main(str(tmp_path), 2), "seeded: the same run twice"


def test_minimal_is_under_a_hundred_lines() -> None:
    assert len((ROOT / "examples" / "minimal.py").read_text().splitlines()) < 100


def test_every_recipe_is_a_valid_config() -> None:
    recipes = list((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        RunConfig(**yaml.safe_load(recipe.read_text()))
