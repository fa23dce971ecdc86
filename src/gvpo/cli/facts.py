"""What a run of a config would be, and this machine, as names and values to print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo.errors import UserError
from gvpo.training.config import RunConfig

if TYPE_CHECKING:
    from gvpo.sources.dataset import Row
    from gvpo.training.plan import RunPlan


def check_has_data(run: RunConfig) -> None:
    """Raise UserError where the config names no train_dataset, nor files of groups that need none."""
    if run.train_dataset is None and not any(spec.type == "files" for spec in run.sources or []):
        raise UserError("no train_dataset; give --train_dataset FILE.jsonl, or set train_dataset in the config")


def run_facts(run: RunConfig) -> list[tuple[str, str]]:
    """What a run of this config would be, by name; all that a run refuses before weights load is refused here too.

    Raises UserError as the trainer would.
    """
    from gvpo.models.modes import run_device
    from gvpo.training.plan import plan_run, support_gap

    check_has_data(run)
    plan = plan_run(run, run.model, run.train_dataset, run.reward_funcs, run.eval_dataset, run.sources)
    functions = ", ".join(function.name for function in plan.reward_functions)
    sizes = sorted({run.groups_per_update * (len(row.completions) or run.num_generations) for row in plan.rows})
    per_update = " to ".join(str(size) for size in dict.fromkeys([sizes[0], sizes[-1]])) if sizes else "as in the files"
    return [
        ("reward functions", functions or "none: the rows bring their rewards"),
        ("train_dataset", _count(plan.rows)),
        ("sources", _sources(plan)),
        ("eval_dataset", _count(plan.eval_rows)),
        ("support", support_gap(run, plan.rows, plan.mixture) or "whatever the reference can give"),
        ("model", _found(run.model)),
        ("objective", run.objective),
        ("reference", str(plan.reference)),
        ("device", str(run_device())),
        ("updates", str(plan.updates)),
        ("prompts per rollout", str(run.groups_per_rollout)),
        ("completions per update", per_update),
        ("run folder", _folder(run.output_dir)),
    ]


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a titled list of names and values, aligned."""
    width = max(len(name) for name, _ in rows) + 2
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}{value}")


def _count(rows: Sequence[Row]) -> str:
    offline = sum(row.offline for row in rows)
    parts = [(len(rows) - offline, "prompts to draw completions for"), (offline, "groups with their own completions")]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "none"


def _sources(plan: RunPlan) -> str:
    return ", ".join(_source(spec, plan) for spec in plan.mixture.described())


def _source(spec: dict[str, Any], plan: RunPlan) -> str:
    """A source's type, and what it brings at most to each group and each update."""
    quotas = [(spec.get("members"), "a group"), (spec.get("groups"), "groups an update")]
    said = [f"{count} {what}" for count, what in quotas if count]
    if spec["type"] == "files" and plan.files:
        said.append(f"{plan.files.held} groups there")
    return spec["type"] + (f" ({', '.join(said)})" if said else "")


def _found(model: str) -> str:
    from gvpo.models.loading import EMBEDDED

    path = Path(model)
    kind = "folder found" if path.is_dir() else "file found" if path.is_file() else "looked up when the run starts"
    return f"{model}: {'embedded weights found' if model == EMBEDDED else kind}"


def _folder(output_dir: str | None) -> str:
    if output_dir is None:
        return "none: nothing is written"
    return f"{output_dir}: {'goes on' if (Path(output_dir) / 'metrics.jsonl').exists() else 'new'}"
