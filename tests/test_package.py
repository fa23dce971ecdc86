"""The package as a whole: public names, import costs, layers."""

from __future__ import annotations

import ast
import inspect
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


def test_the_contracts_signatures() -> None:
    """Names, order and defaults that callers rely on; what stands behind the bar is by keyword."""
    signatures = {
        gvpo.gvpo_weights: "logps_N ref_logps_N rewards_N group_ids_N | beta components",
        gvpo.gvpo_loss: "logps_N ref_logps_N rewards_N group_ids_N | beta denominator=None",
        gvpo.gvpo_components: "logps_N ref_logps_N rewards_N group_ids_N | beta",
        gvpo.sequence_logprobs: "model groups | tokenizer=None token_budget=None share_prefix=True",
        gvpo.accumulate_gradients: "model groups | beta tokenizer=None token_budget=None share_prefix=True "
        "objective='gvpo' denominator=None",
        gvpo.Completion: "text=None token_ids=None | reward=None source='policy' ref_logprob=None truncated=False "
        "loss_mask=None meta ref_token_logprobs=None old_token_logprobs=None",
        gvpo.Group: "prompt completions | prompt_ids=None id=None columns",
        gvpo.GVPOTrainer: "model train_dataset reward_funcs=None | config=None tokenizer=None eval_dataset=None "
        "sources=None",
        gvpo.GVPOTrainer.train: "self resume_from_checkpoint=None",
        gvpo.GVPOTrainer.save_model: "self path",
    }
    for function, expected in signatures.items():
        before, _, after = expected.partition(" | ")
        parameters = inspect.signature(function).parameters.values()
        shown = {parameter.kind: [] for parameter in parameters}
        for parameter in parameters:
            plain = isinstance(parameter.default, str | bool | None)
            shown[parameter.kind].append(f"{parameter.name}={parameter.default!r}" if plain else parameter.name)
        assert shown[inspect.Parameter.POSITIONAL_OR_KEYWORD] == before.split()
        assert shown.get(inspect.Parameter.KEYWORD_ONLY, []) == after.split()


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    }
    assert seen == gvpo._HOME


def test_no_two_modules_import_each_other() -> None:
    names = {
        file: ".".join(["gvpo", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        for file in SOURCE.rglob("*.py")
    }
    imported = {name: imports_of(file) & set(names.values()) for file, name in names.items()}

    imported["gvpo"] = imported["gvpo.rewards"] = set()  # their re-exports are lazy

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            new = imported[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    assert [name for name in imported if name in reached(name)] == []


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
        ("lab", ("gvpo.training", "gvpo.models", "gvpo.sampling", "gvpo.sources", "gvpo.rewards", "gvpo.report")),
        ("report", ("gvpo.training", "gvpo.models", "gvpo.sampling", "gvpo.sources", "gvpo.rewards")),
    ],
)
def test_layers_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    for file in (SOURCE / folder).glob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith(forbidden)], file


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    for file in SOURCE.rglob("*.py"):
        if file.parent.name != "cli" and file.name != "__main__.py":
            assert not [name for name in imports_of(file) if name.startswith("gvpo.cli")], file
