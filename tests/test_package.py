"""The package as a whole: public names, import costs, layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gvpo

SOURCE = Path(gvpo.__file__).parent
HEAVY = ["transformers", "datasets", "accelerate", "trl", "vllm", "ray", "verl", "pandas", "plotly"]


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_public_name_resolves_to_itself() -> None:
    for name in gvpo.__all__:
        assert getattr(gvpo, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gvpo.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_the_contract_names_are_public() -> None:
    contract = {
        "Completion", "Group", "GVPOConfig", "GVPOTrainer", "accumulate_gradients", "gvpo_components", "gvpo_loss",
        "gvpo_weights", "load_model", "sequence_logprobs",
    }  # fmt: skip
    assert contract <= set(gvpo.__all__)


def test_import_gvpo_imports_nothing_heavy() -> None:
    code = f"import sys, gvpo; gvpo.gvpo_loss; gvpo.Group;print([name for name in {HEAVY!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_objective_imports_torch_and_the_standard_library_alone() -> None:
    for file in (SOURCE / "objective").glob("*.py"):
        for name in imports_of(file):
            top = name.split(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names or name.startswith("gvpo.objective"), (file, name)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("models", ("gvpo.training", "gvpo.sampling", "gvpo.sources", "gvpo.rewards", "gvpo.report")),
        ("sampling", ("gvpo.training", "gvpo.sources", "gvpo.rewards")),
        ("rewards", ("gvpo.training", "gvpo.sources", "gvpo.sampling", "gvpo.models")),
        ("sources", ("gvpo.training", "gvpo.report")),
        ("evaluation", ("gvpo.training", "gvpo.report")),
    ],
)
def test_layers_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    for file in (SOURCE / folder).glob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith(forbidden)], file


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    for file in SOURCE.rglob("*.py"):
        if file.parent.name != "cli":
            assert not [name for name in imports_of(file) if name.startswith("gvpo.cli")], file
