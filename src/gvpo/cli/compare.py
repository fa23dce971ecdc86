"""`gvpo compare`: two evaluations on the same problems, and whether they differ by more than luck."""

from __future__ import annotations

from typing import Annotated

import typer

from gvpo.errors import UserError


def compare(
    a: Annotated[str, typer.Argument(metavar="RUN_A", help="Folder of a finished gvpo eval.")],
    b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another one, on the same problems.")],
    out: Annotated[str | None, typer.Option("--out", metavar="FILE.json", help="Also write the numbers here.")] = None,
) -> None:
    """Compare two runs problem by problem: difference, paired interval, exact p-value, what could have been seen."""
    from pathlib import Path

    from gvpo.evaluation.compare import compare_runs, read_run
    from gvpo.evaluation.folder import write_json
    from gvpo.evaluation.tables import comparison_text

    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {Path(out).parent} does not exist; make it first")
    if out is not None and Path(out).resolve().parent in (Path(a).resolve(), Path(b).resolve()):
        raise UserError(f"--out {out}: is in the folder of a run, whose own files are there; name another place")
    comparison = compare_runs(read_run(a), read_run(b))
    if out is not None:
        write_json(Path(out), comparison)
    print(comparison_text(comparison), end="")
