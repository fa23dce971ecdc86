"""`gvpo lab`: what theory says of the objective, measured on finite policies."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvpo.errors import UserError

if TYPE_CHECKING:
    from gvpo.lab.claim import Claim
    from gvpo.lab.run import Section

WIDE = 110
"""Columns where the output is no terminal."""


def lab(
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Write lab.json, lab.md and figures (PNG, SVG) here.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="One family of claims; may be given again.")
    ] = None,
) -> int:
    """Measure every claim of the theory on finite policies, exactly, in under a minute.

    Families: uniqueness, sampling, finite-groups, iterations, pairs, policy-gradients, ablations.
    The exit code is 0 if every claim holds, 1 if one fails.
    """
    from gvpo.lab.run import FAMILIES, check_families, run_families

    check_families(only or [])
    folder = None if out is None else prepare(out)
    start, claims, figures = time.perf_counter(), [], []
    for section in run_families(only or list(FAMILIES)):
        _show(section.claims)
        claims += section.claims
        if folder is not None:
            with _writing(folder):
                figures += _draw(section, folder)
    if folder is not None:
        with _writing(folder):
            _write(claims, folder)
        print(f"lab.json and lab.md (the same as a table) are in {folder}")
        if figures:
            print(f"figures there, PNG and SVG: {', '.join(figures)}")
    held = sum(claim.holds for claim in claims)
    print(f"{held} of {len(claims)} claims hold ({time.perf_counter() - start:.0f} s)")
    return 0 if held == len(claims) else 1


def prepare(out: str) -> Path:
    """The folder, made if it was not there; what would fail after a minute of computing fails here.

    Raises UserError without matplotlib, or where no file can be written.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UserError("--out draws figures and needs matplotlib: pip install 'gvpo[lab]'") from error
    if not out:
        raise UserError("--out is empty: name a folder")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: {error.filename or 'a file'} cannot be written ({error.strerror})") from error


def _draw(section: Section, folder: Path) -> list[str]:
    from gvpo.lab.figures import draw

    return draw(section, folder)


def _write(claims: list[Claim], folder: Path) -> None:
    from gvpo.lab.claim import markdown

    entries = [claim.as_dict() for claim in claims]
    (folder / "lab.json").write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "lab.md").write_text(markdown(claims), encoding="utf-8")


def _show(claims: list[Claim]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    table = Table("verdict", "claim, statement, what was measured, tolerance", box=box.SIMPLE_HEAD, expand=True)
    for claim in claims:
        table.add_row("[green]holds[/]" if claim.holds else "[bold red]FAILS[/]", _cell(claim))
    console.print(table, highlight=False)


def _cell(claim: Claim) -> Any:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from gvpo.lab.claim import brief

    numbers = Table.grid(padding=(0, 2))
    numbers.add_column(width=29)
    numbers.add_column(width=18, justify="right")
    numbers.add_column()
    for check in claim.checks:
        style = "" if check.holds else "bold red"
        numbers.add_row(Text(check.name), Text(brief(check.value), style=style), Text(check.bound, style="dim"))
    return Group(Text(claim.name, style="bold"), Text(claim.statement), Padding(numbers, (0, 0, 1, 2)))
