"""`gvpo eval`: what a model gets right on sets of problems, with intervals, every completion kept.

The same command goes on where it was stopped; a finished run is shown again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.cli.options import checked_config, config_default, config_option, reward_functions
from gvpo.cli.origins import KEY, Opened, Origin, given_origin, local_origin, server_origin
from gvpo.cli.progress import progress_bar, stoppable
from gvpo.errors import UserError

if TYPE_CHECKING:
    from gvpo.evaluation.suite import EvalTask
    from gvpo.rewards import RewardFunction

MODEL = "smollm2-135m"
LENGTH = 2048
SEED = 42


def eval(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help=f"Hub id, folder or .gguf file; with --server the server's name for it.  [default: {MODEL}, embedded]",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", metavar="NAME", help="A set of tasks: math. May be given again.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME|FILE",
            help="A known task, such as amc; a .jsonl or .parquet file with problem and answer; or "
            "gym:NAME[:SIZE[:SEED]]. May be given again.",
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option("--data_dir", metavar="FOLDER", help="Known tasks are FOLDER/NAME.jsonl, not from the hub."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="INT", help="Only the first so many problems of each task.")
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--num_samples",
            min=1,
            metavar="INT",
            help="Completions per problem.  [default: the task's own; 32 for aime24, else 1]",
        ),
    ] = None,
    max_completion_length: Annotated[
        int | None,
        typer.Option(
            "--max_completion_length", min=1, metavar="INT", help=f"Most tokens of each.  [default: {LENGTH}]"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="FLOAT", help="0 = greedy.  [default: 0 for one sample, else 0.6]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top_p", metavar="FLOAT", help="Nucleus sampling.  [default: 1 for one sample, else 0.95]"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top_k", min=0, metavar="INT", help="Only the likeliest tokens; 0 = all.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="From problem to prompt: chat, verl-math, qwen-math (messages); qwen-math-raw, r1, question, plain "
            "(strings).  [default: chat where there is a chat template or a server, else qwen-math-raw]",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="NAME",
            help="Judges completions, 1 or more is right: module:function, or a ready-made one.  [default: "
            "math_accuracy; of gym: tasks reasoning_gym_score]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, metavar="INT", help=f"Of all draws.  [default: {SEED}]")
    ] = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="The run's folder.", show_default=True)
    ] = "runs/eval",
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help=f"Draw with an OpenAI-compatible server, such as http://localhost:8000; its key is taken from {KEY}.",
        ),
    ] = None,
    use_vllm: Annotated[bool, typer.Option("--use_vllm", help="Draw with vLLM, on this machine's GPU.")] = False,
    rollout_dtype: Annotated[
        str | None,
        typer.Option(
            "--rollout_dtype",
            metavar="DTYPE",
            help="float32, bfloat16, or auto: bfloat16 where the processor computes in it.  [default: auto]",
        ),
    ] = None,
    completions: Annotated[
        str | None,
        typer.Option(
            "--completions",
            metavar="FILE",
            help="Score these instead of drawing: a row a problem, in order, with completions or a completion.",
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, metavar="INT", help="Problems drawn together, then written.", show_default=True),
    ] = 32,
    reward_workers: Annotated[int | None, config_option("reward_workers", "INT")] = config_default("reward_workers"),
    reward_timeout: Annotated[float, config_option("reward_timeout", "SECONDS")] = config_default("reward_timeout"),
    reward_memory: Annotated[float, config_option("reward_memory", "GIB")] = config_default("reward_memory"),
) -> int:
    """Answer problems and score the answers: pass@1 with 95 % intervals, majority votes, lengths.

    Everything is kept in the run's folder; gvpo compare takes two of them.
    """
    from gvpo.evaluation.suite import Drawing, given_completions, load_tasks, task_names

    drawing = Drawing(max_completion_length or LENGTH, num_samples, temperature, top_p, top_k or 0)
    here = {"rollout_dtype": rollout_dtype, "use_vllm": use_vllm or None}
    draws = {"max_completion_length": max_completion_length, "num_samples": num_samples, "seed": seed, **here}
    draws |= {"temperature": temperature, "top_p": top_p, "top_k": top_k, "model": model, "server": server}
    if completions is not None:
        _refuse(draws, "says how completions are drawn, and --completions brings them; leave one of the two out")
        drawing = Drawing(LENGTH, num_samples=1)
    tasks = load_tasks(task_names(suite or [], task or []), data_dir, limit, drawing, reward)
    sampling = {"max_completion_length": drawing.max_completion_length, "top_k": drawing.top_k}
    if completions is not None:
        source, tasks = given_completions(completions, tasks)
        origin, sampling = given_origin(completions, source), {}
    elif server is not None:
        _refuse(here, "is for a model on this machine, and --server has its own; leave one of the two out")
        if model is None:
            raise UserError("--server: needs --model too, the name that the server knows the model by")
        origin = server_origin(server, model)
    else:
        origin = local_origin(model or MODEL, rollout_dtype=rollout_dtype or "auto", use_vllm=use_vllm)
    bounds = {"reward_timeout": reward_timeout, "reward_memory": reward_memory}
    limits = checked_config(reward_workers=reward_workers, **bounds).reward_limits
    functions = {name: reward_functions([name], limits) for name in dict.fromkeys(one.reward for one in tasks)}
    _check_columns(tasks, functions, template)
    settings: dict[str, Any] = {**origin.settings, **sampling, "seed": SEED if seed is None else seed, **bounds}
    settings["tasks"] = {one.name: one.settings(drawn=completions is None) for one in tasks}
    if template is not None:
        settings["template"] = template
    return _evaluate(_Job(Path(out), tasks, functions, origin, batch), settings)


@dataclass(frozen=True)
class _Job:
    """functions: by the name that a task's reward has."""

    folder: Path
    tasks: Sequence[EvalTask]
    functions: Mapping[str, Sequence[RewardFunction]]
    origin: Origin
    batch: int


def _evaluate(job: _Job, settings: dict[str, Any]) -> int:
    """Draw what is missing in the folder, then write and print the results; the exit code."""
    from gvpo.evaluation.folder import RESULTS, SETTINGS, TABLE, read_json, run_folder, write_json, write_text
    from gvpo.evaluation.results import suite_results
    from gvpo.evaluation.tables import results_text
    from gvpo.group_files import read_groups

    folder = job.folder
    with run_folder(folder, settings):
        if (folder / RESULTS).exists():
            print(f"{folder}: is finished; another --out evaluates anew")
            print(results_text(read_json(folder / RESULTS)), end="")
            return 0
        if (folder / SETTINGS).exists():
            settings = read_json(folder / SETTINGS)
        opened = job.origin.open(job.tasks, settings.get("template"))
        settings = {**settings, "template": opened.template}
        write_json(folder / SETTINGS, settings)
        if code := _draw(job, opened, settings["seed"]):
            return code
        results = suite_results(settings, {one.name: list(read_groups(_file(job, one))) for one in job.tasks})
        text = results_text(results)
        write_text(folder / TABLE, text)
        write_json(folder / RESULTS, results)
        print(text, end="")
    return 0


def _draw(job: _Job, opened: Opened, seed: int) -> int:
    """Draw and score what is missing; 0, or the exit code of who was stopped."""
    from gvpo.evaluation.run import Drawer, evaluate_task
    from gvpo.evaluation.votes import EqualInWorkers
    from gvpo.sources.dataset import column_names

    equal = EqualInWorkers()
    total, before, there = sum(len(one.problems) for one in job.tasks), 0, 0
    with stoppable("gvpo eval", "this batch") as stop, progress_bar("problems", total) as show:
        for one in job.tasks:

            def go_on(count: int, task: EvalTask = one, first: int = before) -> bool:
                nonlocal there
                there = first + count
                show(there, task.name)
                return stop.code is None

            rows, functions, k = one.rows(opened.template), job.functions[one.reward], one.num_samples
            source, columns = opened.source(one.params), column_names(rows)
            drawer = Drawer(source, opened.tokenizer, functions, columns, equal, k, seed)
            try:
                done = evaluate_task(rows, _file(job, one), drawer, job.batch, go_on)
            except UserError as error:
                kept = f"{there} of {total} problems are in {job.folder}, the same command goes on from there"
                raise UserError(f"{error}; {kept}") from error
            if not done:
                print(f"{job.folder}: {there} of {total} problems; stopped, the same command goes on from here")
                return stop.code or 0
            before += len(one.problems)
    return 0


def _file(job: _Job, task: EvalTask) -> Path:
    return job.folder / f"{task.name}.jsonl"


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name}: {reason}")


def _check_columns(
    tasks: Sequence[EvalTask], functions: Mapping[str, Sequence[RewardFunction]], template: str | None
) -> None:
    """What is kept must be JSON, reach the functions, and have answers in it; the template must be one."""
    from gvpo.rewards.calling import check_signatures
    from gvpo.sources.dataset import column_names
    from gvpo.training.data_checks import check_answers, check_columns

    for one in tasks:
        rows = one.rows(template or "plain")
        check_columns(rows)
        check_signatures(functions[one.reward], column_names(rows))
        check_answers(rows, functions[one.reward])
