"""Rows of the recipes' data: verl's own rule takes the right answer, and no other."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from verl.utils.reward_score import default_compute_score

PREPARE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "verl" / "prepare_data.py"))


@pytest.mark.parametrize(
    ("name", "solution", "right", "wrong"),
    [
        ("gsm8k", "9 * 2 = 1,018\n#### 1,018", "so #### 1,018", "so #### 1,017"),
        ("math", r"It is \boxed{\frac{1}{2}}.", r"\boxed{\frac12}", r"\boxed{\frac13}"),
        ("math", r"It is $\boxed 9$.", r"\boxed{9}", r"\boxed{8}"),
    ],
)
def test_verls_rule_takes_the_right_answer(name, solution, right, wrong):
    row = PREPARE["verl_row"](PREPARE["TASKS"][name], "How many?", PREPARE["final_answer"](solution), 0)
    truth = row["reward_model"]["ground_truth"]
    assert default_compute_score(row["data_source"], right, truth) == 1
    assert default_compute_score(row["data_source"], wrong, truth) == 0
