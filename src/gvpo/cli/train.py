"""`gvpo train`: a config file and flags become a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gvpo.cli.options import read_config, with_config_flags
from gvpo.errors import UserError
from gvpo.training.config import RunConfig, dump_config

if TYPE_CHECKING:
    from gvpo.sources.dataset import Row


@with_config_flags
def train(
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML with these names and values; flags win.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would happen, and load no weights.")
    ] = False,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume-from-checkpoint", metavar="latest|PATH", help="Go on from the newest checkpoint, or this."
        ),
    ] = None,
    **settings: str | None,
) -> None:
    """Train a model by regression onto rewards.

    Values are written as in a config file: 1e-6 is a number, null is nothing, lists are [a, b] (in quotes).
    """
    run = read_config(config, settings)
    if dry_run:
        from gvpo.cli.doctor import show

        facts = run_facts(run)
        print(dump_config(run))
        show("Nothing is trained; this run would be", facts)
        return
    check_has_data(run)
    from gvpo.training.loop import GVPOTrainer
    from gvpo.training.run_folder import RunFolder

    RunFolder(run.output_dir, resume=resume_from_checkpoint is not None)  # refused before weights load
    trainer = GVPOTrainer(run.model, run.train_dataset, run.reward_funcs, config=run, eval_dataset=run.eval_dataset)
    trainer.train(resume_from_checkpoint=True if resume_from_checkpoint == "latest" else resume_from_checkpoint)
    if os.environ.get("RANK", "0") == "0":
        print(_where(run))


def check_has_data(run: RunConfig) -> None:
    """Raise UserError where the config names no train_dataset."""
    if run.train_dataset is None:
        raise UserError("no train_dataset; give --train_dataset FILE.jsonl, or set train_dataset in the config")


def run_facts(run: RunConfig) -> list[tuple[str, str]]:
    """What a run of this config would be, by name; everything that can be known without weights has been checked.

    Raises UserError as the trainer would, in its order: reward imports, rows, model path.
    """
    from gvpo.cli.doctor import device
    from gvpo.models.loading import check_model
    from gvpo.rewards.resolve import resolve_rewards
    from gvpo.sources.dataset import read_rows
    from gvpo.training.data_checks import check_rewards
    from gvpo.training.plan import choose_reference, planned_updates

    check_has_data(run)
    functions = [] if run.reward_funcs is None else resolve_rewards(run.reward_funcs)
    rows, eval_rows = (
        [] if data is None else read_rows(data, prompt_column=run.prompt_column, name=name)
        for name, data in (("train_dataset", run.train_dataset), ("eval_dataset", run.eval_dataset))
    )
    check_rewards(rows, eval_rows, functions, run.reward_weights)
    reference = choose_reference(run, rows)
    check_model(run.model)
    sizes = sorted({run.groups_per_update * (len(row.completions) or run.num_generations) for row in rows})
    return [
        (
            "reward functions",
            ", ".join(function.name for function in functions) or "none: the rows bring their rewards",
        ),
        ("train_dataset", _count(rows)),
        ("eval_dataset", _count(eval_rows)),
        ("model", _found(run.model)),
        ("reference", str(reference)),
        ("device", str(device())),
        ("updates", str(planned_updates(run, len(rows)))),
        ("prompts per rollout", str(run.groups_per_rollout)),
        ("completions per update", " to ".join(str(size) for size in dict.fromkeys([sizes[0], sizes[-1]]))),
        ("run folder", _folder(run.output_dir)),
    ]


def _count(rows: Sequence[Row]) -> str:
    offline = sum(row.offline for row in rows)
    parts = [(len(rows) - offline, "prompts to draw completions for"), (offline, "groups with their own completions")]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "none"


def _found(model: str) -> str:
    from gvpo.models.loading import EMBEDDED

    path = Path(model)
    kind = "folder found" if path.is_dir() else "file found" if path.is_file() else "looked up when the run starts"
    return f"{model}: {'embedded weights found' if model == EMBEDDED else kind}"


def _folder(output_dir: str | None) -> str:
    if output_dir is None:
        return "none: nothing is written"
    used = Path(output_dir).is_dir() and any(Path(output_dir).iterdir())
    return f"{output_dir}: {'holds files already: refused, unless it resumes' if used else 'new'}"


def _where(run: RunConfig) -> str:
    if run.output_dir is None:
        return "Nothing was written: output_dir is null."
    names = {"model/": "the trained model", "metrics.jsonl": "a row an update", "completions/": "every group"}
    files = "\n".join(f"  {Path(run.output_dir) / name}  {what}" for name, what in names.items())
    return f"{run.output_dir}\n{files}"
