"""`gvpo train`: a config file and flags become a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gvpo.cli.facts import check_has_data, run_facts, show
from gvpo.cli.options import read_config, with_config_flags
from gvpo.training.config import RunConfig, dump_config


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
    check_has_data(run)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        _check_folder(run, resume_from_checkpoint)
    if dry_run:
        facts = run_facts(run)
        print(dump_config(run))
        show("Nothing is trained; this run would be", facts)
        return
    from gvpo.training.loop import GVPOTrainer
    from gvpo.training.preemption import EXIT_CODE, Stopped

    trainer = GVPOTrainer(
        run.model,
        run.train_dataset,
        run.reward_funcs,
        config=run,
        eval_dataset=run.eval_dataset,
        sources=run.sources,
    )
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except Stopped as stopped:
        if is_main:
            print(
                f"Stopped by SIGTERM after update {stopped.update} of {trainer.total_updates}; {stopped.checkpoint} is "
                "saved; the same command with --resume-from-checkpoint latest goes on."
            )
        raise typer.Exit(EXIT_CODE) from None
    if is_main:
        print(_where(run))


def _check_folder(run: RunConfig, resume: str | None) -> None:
    """What the trainer refuses when it starts to train, refused before weights load."""
    from gvpo.training.checkpoint import find_checkpoint, is_of_run
    from gvpo.training.run_folder import check_output_dir

    checkpoint = None if resume is None else find_checkpoint(resume, run.output_dir)
    check_output_dir(run.output_dir, resume=is_of_run(checkpoint, run.output_dir))


def _where(run: RunConfig) -> str:
    if run.output_dir is None:
        return "Nothing was written: output_dir is null."
    names = {
        "model": "the trained model",
        "metrics.jsonl": "one row per update",
        "completions": "every group",
        "summary.json": "the end of it",
    }
    files = "\n".join(f"  {Path(run.output_dir) / name}  {what}" for name, what in names.items())
    return f"{run.output_dir}\n{files}"
