"""`gvpo prepare`: prompts with their accepted answers from a task, in a file that `gvpo train` takes.

And whether the problems are those of a test set: rows are written with them or without.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.errors import UserError

if TYPE_CHECKING:
    from gvpo.tasks.overlap import Overlap
    from gvpo.tasks.problems import Problem

WIDE = 110
"""Columns where the output is no terminal."""

MANY = 0.5
"""A problem that shares this much of its n-grams is counted apart: by then it is hardly a phrase that both use."""


def prepare(
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="NAME|FILE",
            help="gsm8k-train, math, ...; a .jsonl or .parquet file; or gym:NAME[:SIZE[:SEED]]. May be given again.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE.jsonl", help="Write the rows here; what was there goes.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            "--template",
            metavar="NAME",
            help="chat, verl-math, qwen-math (messages); qwen-math-raw, r1, question, plain (strings).",
            show_default=True,
        ),
    ] = "chat",
    data_dir: Annotated[
        str | None,
        typer.Option("--data_dir", metavar="DIR", help="Read known tasks from DIR/NAME.jsonl, not from the hub."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="INT", help="Only the first so many of each task.")
    ] = None,
    check_against: Annotated[
        list[str] | None,
        typer.Option(
            "--check_against",
            metavar="NAME|FILE",
            help="Compare with the test problems of a suite (math: AIME 2024, AMC, MATH-500, Minerva, OlympiadBench), "
            "a task or a file. May be given again.",
        ),
    ] = None,
    ngram: Annotated[
        int, typer.Option("--ngram", min=1, metavar="INT", help="Words that two problems share.", show_default=True)
    ] = 13,
    drop_overlap: Annotated[
        bool,
        typer.Option("--drop_overlap", help="Leave out the problems that share --ngram words with a test problem."),
    ] = False,
    min_share: Annotated[
        float,
        typer.Option(
            "--min_share",
            min=0,
            max=1,
            metavar="FLOAT",
            help="Leave them out only if they have this share of the test problem's n-grams; 0 = one is enough.",
            show_default=True,
        ),
    ] = 0.0,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.json", help="Write here all that is shared, with the texts.")
    ] = None,
) -> None:
    """Write the problems of a task as prompts with their accepted answers, and compare them with test sets.

    The rows have the columns prompt, answers, problem and id; gvpo train --reward_funcs math_accuracy takes them.
    """
    from gvpo.tasks.overlap import index_tests, largest_share, measure_overlap
    from gvpo.tasks.registry import load_problems, task_labels
    from gvpo.tasks.templates import find_template, prompt_rows

    find_template(template)
    _check_options(out, check_against, drop_overlap, min_share, report)
    task_labels(task)  # refuses two of one name
    _check_targets({"--out": out, "--report": report}, [*task, *(check_against or [])], data_dir)
    problems = [problem for name in task for problem in load_problems(name, data_dir=data_dir, limit=limit)]
    kept = problems
    if check_against:
        index = index_tests(_tests(check_against, data_dir), ngram)
        _report(measure_overlap(index, ((problem.where, problem.text) for problem in problems)), report)
        if drop_overlap:
            shares = [largest_share(index, problem.text) for problem in problems]
            kept = [one for one, share in zip(problems, shares, strict=True) if share == 0 or share < min_share]
    if out is not None:
        if not kept:
            raise UserError("--drop_overlap leaves no row: every problem shares words with a test problem")
        _write(out, _lines(kept, prompt_rows(kept, template)))
        dropped = f", {len(problems) - len(kept)} left out" if drop_overlap else ""
        print(f"{out}: {len(kept)} rows of {', '.join(task)}, template {template}{dropped}")


def _check_options(
    out: str | None, check_against: Sequence[str] | None, drop_overlap: bool, min_share: float, report: str | None
) -> None:
    if out is None and not check_against:
        raise UserError("nothing to do: give --out FILE.jsonl, or --check_against a suite, or both")
    if drop_overlap and not (check_against and out):
        raise UserError("--drop_overlap leaves rows out of --out: give --out, and --check_against what not to share")
    if min_share and not drop_overlap:
        raise UserError("--min_share says what --drop_overlap leaves out: give that too")
    if report is not None and not check_against:
        raise UserError("--report writes what is shared: give --check_against too")
    if out is not None and Path(out).suffix.lower() != ".jsonl":
        raise UserError(f"--out {out}: rows are written as JSON lines; name a .jsonl file")
    if report is not None and Path(report).suffix.lower() != ".json":
        raise UserError(f"--report {report}: is written as JSON; name a .json file")


def _check_targets(targets: dict[str, str | None], names: Sequence[str], data_dir: str | None) -> None:
    """Refuse what cannot be written, and what would be written over the problems themselves."""
    from gvpo.tasks.registry import task_files

    read = {path.resolve() for name in names for path in task_files(name, data_dir)}
    for option, name in targets.items():
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            raise UserError(f"{option} {name}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"{option} {name}: the folder {path.parent} does not exist; make it first")
        if path.resolve() in read:
            raise UserError(f"{option} {name}: the problems are read from this file; name another")


def _tests(names: Sequence[str], data_dir: str | None) -> list[Problem]:
    from gvpo.tasks.registry import SUITES, load_problems

    tasks = dict.fromkeys(task for name in names for task in SUITES.get(name, (name,)))
    return [problem for name in tasks for problem in load_problems(name, data_dir=data_dir)]


def _report(overlap: Overlap, path: str | None) -> None:
    _show(overlap)
    if path is not None:
        _write(path, [json.dumps(overlap.as_dict(), ensure_ascii=False, indent=2)])
        print(f"{path}: the problems found, each with the training text that shares most")


def _lines(problems: Sequence[Problem], rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    for problem, row in zip(problems, rows, strict=True):
        try:
            yield json.dumps(row, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{problem.where}: cannot be written as JSON ({error}); remove that column") from error


def _write(path: str, lines: Iterable[str]) -> None:
    """The whole file or, after an error, nothing new."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(temporary, target)
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); check the path and its permissions") from error
    finally:
        temporary.unlink(missing_ok=True)


def _show(overlap: Overlap) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    heads = ("test set", "problems", f"share {overlap.n} words", f"{MANY:.0%} or more", "the same", "nearest")
    table = Table(*heads, box=box.SIMPLE_HEAD)
    for name, size in overlap.sets.items():
        found = overlap.of(name)
        many, same = sum(one.share >= MANY for one in found), sum(one.exact > 0 for one in found)
        nearest = f"{found[0].id}, {found[0].share:.0%}: {found[0].nearest}" if found else ""
        table.add_row(name, str(size), str(len(found)), str(many), str(same), nearest)
    console.print(table, highlight=False, markup=False)
    shared = f"share {overlap.n} words in a row with a test problem, or are one"
    print(f"{overlap.flagged} of {overlap.texts} problems {shared}")
    if overlap.short:
        print(f"{overlap.short} test problems have fewer words: they are found only where they are whole")
