"""`gvpo export-verl`: a config and its data as a folder that verl runs from.

Covered: runs whose completions all come from the policy, under the rollout's reference or the initial one. Not covered:
other sources, other objectives, LoRA: each is refused in one line.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.cli.facts import check_has_data, show
from gvpo.cli.options import read_config, with_config_flags
from gvpo.errors import UserError

if TYPE_CHECKING:
    from gvpo.integrations.verl_runs.options import Facts
    from gvpo.sources.dataset import Row
    from gvpo.training.plan import RunPlan

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template under which one message is its text."""

SCRIPT = """#!/usr/bin/env bash
# Written by gvpo export-verl from {source}. Options of verl given here are added and win:
#   {name} trainer.n_gpus_per_node=8
#   {name} --dry-run        checks every option against the verl that is installed, and starts nothing
{notes}set -euo pipefail
here="$(dirname "$(readlink -f "${{BASH_SOURCE[0]}}")")"
quoted="${{here//\\'/\\\\\\'}}"  # as hydra reads it between single quotes
export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"  # where reward functions are found, on every node
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
    from gvpo.integrations.verl_runs.options import check_run, differences
    from gvpo.training.plan import plan_run

    run = read_config(config, settings)
    check_has_data(run)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; give another name")
    # Engines and trackers are the other machine's.
    plain = run.model_copy(update={"use_vllm": False, "report_to": "none"})
    plan = plan_run(plain, run.model, run.train_dataset, run.reward_funcs, run.eval_dataset, run.sources)
    _check_rows([*plan.rows, *plan.eval_rows])
    values = {name: getattr(run, name) for name in type(run).model_fields}
    check_run(values, plan.reference)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
            made = Path(unfinished) / "run"
            made.mkdir()
            facts, options = _write_run(values, plan, made)
            options |= {"trainer.n_gpus_per_node": gpus, "trainer.nnodes": nodes}
            notes = differences(values, facts)
            _write_script(made, options, notes, config, folder / "run.sh")
            os.replace(made, folder)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    show(f"{folder}", [("run.sh", "the run"), ("train.parquet", f"{facts.prompts} rows")])
    print("\nverl does otherwise", *notes, sep="\n  ")
    print(f"\nNext, where verl is installed: {folder / 'run.sh'} --dry-run")


def _write_run(values: Mapping[str, Any], plan: RunPlan, made: Path) -> tuple[Facts, dict[str, Any]]:
    """Write data, and the model where verl cannot load it. Returns what they say of the run, and the options."""
    from gvpo.integrations.verl_runs.options import Facts, verl_options

    rows = [*plan.rows, *plan.eval_rows]
    model, tokenizer = _model(values["model"], made, partial(_template, rows))
    template = _template(rows, tokenizer)
    longest = max(len(_as_verl(row, tokenizer, template)) for row in rows)
    # A file that does not fill a rollout is there several times: verl trains on whole batches alone.
    batch = values["groups_per_update"] * values["updates_per_rollout"]
    train = [*plan.rows] * -(-batch // len(plan.rows))
    _write(made / "train.parquet", train)
    _write(made / "eval.parquet", plan.eval_rows or plan.rows[:1])
    facts = Facts(len(train), max(1, longest), plan.updates, plan.reference, template, bool(plan.eval_rows))
    options = verl_options(values, facts)
    return facts, options if model is None else options | {"actor_rollout_ref.model.path": model}


def _write_script(made: Path, options: Mapping[str, Any], notes: Sequence[str], source: str, name: Path) -> None:
    """Write run.sh, which finds its folder wherever it is moved to."""
    from gvpo.integrations.verl_runs.options import command

    files = {"data.train_files": "train.parquet", "data.val_files": "eval.parquet"}
    files |= {} if "actor_rollout_ref.model.path" in options else {"actor_rollout_ref.model.path": "model"}
    files |= {"trainer.default_local_dir": "checkpoints"}
    lines = [*map(shlex.quote, command(options)), *(f"{one}=\"'$quoted/{file}'\"" for one, file in files.items())]
    text = SCRIPT.format(
        source=_printable(source),
        name=_printable(str(name)),
        notes="".join(f"# {line}\n" for line in ["What verl does otherwise:", *notes]),
        path=shlex.quote(str(Path.cwd())),
        options="\n".join(f"    {line} \\" for line in lines),
    )
    script = made / "run.sh"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _check_rows(rows: Iterable[Row]) -> None:
    for row in rows:
        if row.offline:
            raise UserError(
                f"{row.where}: brings its own completions, and verl draws all from the policy; leave it out"
            )
        if row.prompt is None:
            raise UserError(f"{row.where}: has prompt_ids alone, and verl reads text; give a prompt")
        if isinstance(row.prompt, list) and any(set(message) != {"role", "content"} for message in row.prompt):
            raise UserError(f"{row.where}: a message has more than role and content, which files for verl do not keep")
        if isinstance(row.prompt, list) and row.prompt[-1]["role"] == "assistant":
            raise UserError(f"{row.where}: ends with the assistant's turn, which verl does not go on with")


def _model(name: str, folder: Path, check: Callable[[Any], object]) -> tuple[str | None, Any]:
    """The model as verl finds it, None where it is saved into the folder as `model`, and its tokenizer.

    check: of the tokenizer, before anything is saved.
    Raises UserError for a LoRA adapter and for a model without a tokenizer.
    """
    from gvpo.models.loading import EMBEDDED, load_model, load_tokenizer

    path = Path(name)
    if (path / "adapter_config.json").exists():
        raise UserError(f"model {name}: an adapter; merge it into its model first, or set verl's lora_rank")
    if name == EMBEDDED or path.suffix == ".gguf":
        model, tokenizer = load_model(name)
        assert tokenizer is not None
        check(tokenizer)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return None, tokenizer
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise UserError(f"model {name}: has no tokenizer, and verl needs one")
    return (str(path.resolve()) if path.exists() else name), tokenizer


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

    made = []
    for index, row in enumerate(rows):
        try:
            kept = json.dumps({"prompt": row.prompt, "columns": row.columns})
        except TypeError as error:
            raise UserError(f"{row.where}: a column cannot be written as JSON ({error})") from error
        made.append(
            {
                "data_source": "gvpo",
                "prompt": _messages(row),
                "ability": "",
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": index, ROW: kept},
            }
        )
    pq.write_table(pa.Table.from_pylist(made), path)
