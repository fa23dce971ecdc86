"""`gvpo export-verl`: a config and its data as a folder that verl runs from.

Covered: runs whose completions all come from the policy, under the rollout's reference or the initial one. Not covered:
other sources, other objectives, LoRA: each is refused in one line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.cli.facts import check_has_data, show
from gvpo.cli.options import read_config, with_config_flags
from gvpo.errors import UserError
from gvpo.training.config import RunConfig

if TYPE_CHECKING:
    from gvpo.sources.dataset import Row

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template under which one message is its text."""

SCRIPT = """#!/usr/bin/env bash
# Written by gvpo export-verl from {source}. Options of verl given here are added and win:
#   {name} trainer.n_gpus_per_node=8
#   {name} --dry-run        checks every option against the verl that is installed, and starts nothing
{notes}set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"  # where reward functions are found
run=(python3 -m verl.trainer.main_ppo)
if [[ "${{1:-}}" == --dry-run ]]; then
    shift
    run=(python3 -W ignore -m gvpo.integrations.verl_runs.dry_run)
fi
exec "${{run[@]}}" \\
{options}
    "$@"
"""


@with_config_flags
def export_verl(
    config: Annotated[str, typer.Argument(metavar="FILE", help="YAML as for gvpo train; flags win.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where to write; new or empty.")] = "verl-run",
    gpus: Annotated[int, typer.Option("--gpus", metavar="INT", min=1, help="GPUs of a node.", show_default=True)] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="INT", min=1, help="Nodes.", show_default=True)] = 1,
    **settings: str | None,
) -> None:
    """Write a run of this library as a run of verl: a script, the data, and the model where it is a GGUF file.

    verl need not be installed here; where it is, FOLDER/run.sh --dry-run checks every option.
    """
    from gvpo.integrations.verl_runs.options import Facts, command, differences, verl_options
    from gvpo.training.plan import plan_run

    run = read_config(config, settings)
    check_has_data(run)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; give another name")
    plan = plan_run(run, run.model, run.train_dataset, run.reward_funcs, run.eval_dataset, run.sources)
    rows = [*plan.rows, *plan.eval_rows]
    values = {name: getattr(run, name) for name in type(run).model_fields}
    _check_rows(rows)
    # What verl cannot do is refused before a model is loaded.
    verl_options(values, Facts(run.groups_per_rollout, 1, plan.updates, plan.reference, None, False))
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _model(run, folder)
    template = _template(rows, tokenizer)
    longest = max(len(_as_verl(row, tokenizer, template)) for row in rows)
    train = [*plan.rows] * -(-run.groups_per_rollout // len(plan.rows))
    _write(folder / "train.parquet", train)
    _write(folder / "eval.parquet", plan.eval_rows or plan.rows[:1])
    facts = Facts(len(train), longest, plan.updates, plan.reference, template, bool(plan.eval_rows))
    options = verl_options(values, facts) | {"trainer.n_gpus_per_node": gpus, "trainer.nnodes": nodes}
    files = ['data.train_files="$here/train.parquet"', 'data.val_files="$here/eval.parquet"']
    files += [f"actor_rollout_ref.model.path={model}", 'trainer.default_local_dir="$here/checkpoints"']
    notes = differences(values)
    script = folder / "run.sh"
    script.write_text(
        SCRIPT.format(
            source=config,
            name=script,
            notes="".join(f"# {line}\n" for line in ["What verl does otherwise:", *notes] if notes),
            path=shlex.quote(str(Path.cwd())),
            options="\n".join(f"    {one} \\" for one in [*map(shlex.quote, command(options)), *files]),
        ),
        encoding="utf-8",
    )
    script.chmod(0o755)
    show(
        f"{folder}",
        [("run.sh", f"{len(options) + len(files)} options of verl"), ("train.parquet", f"{len(train)} rows")],
    )
    show("verl does otherwise", [("-", line) for line in notes])
    print(f"\nNext, where verl is installed: {script} --dry-run")


def _check_rows(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.offline:
            raise UserError(
                f"{row.where}: brings its own completions, and verl draws all from the policy; leave it out"
            )
        if row.prompt is None:
            raise UserError(f"{row.where}: has prompt_ids alone, and verl reads text; give a prompt")
        if isinstance(row.prompt, list) and row.prompt[-1]["role"] == "assistant":
            raise UserError(f"{row.where}: ends with the assistant's turn, which verl does not go on with")


def _model(run: RunConfig, folder: Path) -> tuple[str, Any]:
    """The model as the script names it, and its tokenizer; what verl cannot load is saved into the folder.

    Raises UserError for a LoRA adapter and for a model without a tokenizer.
    """
    from gvpo.models.loading import EMBEDDED, load_model, load_tokenizer

    if (Path(run.model) / "adapter_config.json").exists():
        raise UserError(f"model {run.model}: an adapter; merge it into its model first, or set verl's lora_rank")
    if run.model == EMBEDDED or run.model.endswith(".gguf"):
        model, tokenizer = load_model(run.model)
        assert tokenizer is not None
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return '"$here/model"', tokenizer
    tokenizer = load_tokenizer(run.model)
    if tokenizer is None:
        raise UserError(f"model {run.model}: has no tokenizer, and verl needs one")
    path = Path(run.model)
    return shlex.quote(str(path.resolve()) if path.exists() else run.model), tokenizer


def _template(rows: Sequence[Row], tokenizer: Any) -> str | None:
    """The chat template under which verl reads every prompt as this library does; None for the model's own.

    Raises UserError for the first prompt that it cannot.
    """
    from gvpo.models.encoding import encode_prompt

    texts = {isinstance(row.prompt, str) for row in rows}
    if len(texts) > 1:
        raise UserError("some prompts are strings and some are messages: verl takes one kind; use messages")
    fitting: list[str | None] = [PLAIN, "{{ bos_token }}" + PLAIN] if texts == {True} else [None]
    for row in rows:
        assert row.prompt is not None
        ids = encode_prompt(row.prompt, tokenizer)
        fitting = [one for one in fitting if _as_verl(row, tokenizer, one) == ids]
        if not fitting:
            raise UserError(f"{row.where}: verl would read this prompt as other tokens; give it as messages")
    return fitting[0]


def _as_verl(row: Row, tokenizer: Any, template: str | None) -> list[int]:
    extra = {} if template is None else {"chat_template": template}
    return list(
        tokenizer.apply_chat_template(
            _messages(row), add_generation_prompt=True, tokenize=True, return_dict=False, **extra
        )
    )


def _messages(row: Row) -> list[dict[str, Any]]:
    return [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt or [])


def _write(path: Path, rows: Sequence[Row]) -> None:
    """Rows as verl reads them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gvpo.integrations.verl_runs.reward import ROW

    made = [
        {
            "data_source": "gvpo",
            "prompt": _messages(row),
            "ability": "",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index, ROW: json.dumps({"prompt": row.prompt, "columns": row.columns})},
        }
        for index, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(made), path)
