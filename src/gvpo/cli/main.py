"""The `gvpo` command: finds the subcommand, and turns what the user got wrong into one line.

Nothing heavy is imported here, so that `gvpo --help` answers at once; a command's module is imported when it is called.
Exit codes: 0 done, 1 a check failed or a bug of ours (with its traceback), 2 a mistake of the user, 130 interrupted,
143 stopped by SIGTERM with nothing half-written.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import io
import os
import sys
from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gvpo.errors import UserError

COMMANDS = {
    "train": "Train a model by regression onto rewards.",
    "demo": "Watch the embedded model learn, in minutes, on this machine.",
    "sample": "Draw groups of completions from a model into a file or folder.",
    "score": "Add rewards to groups in files.",
    "prepare": "Write a task's problems as prompts with answers; compare them with test sets.",
    "eval": "Measure a model on mathematics, or on any problems with answers.",
    "compare": "Test whether two evaluations differ, problem by problem.",
    "export-verl": "Write a run as a run of verl, for a cluster.",
    "lab": "Measure the theory on finite policies: every claim, exactly.",
    "doctor": "Check the installation, the device, and that scores are exact.",
}
"""Each is the function of that name in the module `gvpo.cli.<name>`, with _ for -; in the order of the help."""

SWITCH = "true|false"
"""Metavar of an option that may be given without its value, which is then true."""

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int | None:
    """Run `gvpo` with these arguments, default those of the process.

    Returns the exit code, None for 0. A mistake of the user is one line on standard error and 2; any other exception
    passes through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Completions hold any character; a terminal or a pipe that cannot show one must not end the run.
        sys.stdout.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        # The bars that libraries draw while they load and save are noise in a file.
        os.environ.setdefault("TQDM_DISABLE", "1")
    arguments = sys.argv[1:] if argv is None else argv
    name = f"gvpo {arguments[0]}" if arguments and arguments[0] in COMMANDS else "gvpo"
    try:
        code = _group().main(list(arguments), prog_name="gvpo", standalone_mode=False)
    except (UserError, typer.TyperException) as error:
        return _complain(name, _explain(name, error), 2)
    except OSError as error:
        # Paths are the user's: looking whether there is anything at one fails where its folder may not be entered.
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        reason = f"cannot be opened ({error.strerror}); check the path and its permissions"
        return _complain(name, f"{error.filename}: {reason}", 2)
    except typer.Abort as error:
        # typer takes an EOFError for a closed prompt; there are no prompts here.
        raise error.__cause__ or error from None
    return _complain(name, "interrupted", code) if code == _INTERRUPTED else code


class Command(TyperCommand):
    """A command whose `--bf16` alone is `--bf16 true`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every switch without a value its value, then parse."""
        switches = {
            option for param in self.params if getattr(param, "metavar", None) == SWITCH for option in param.opts
        }
        complete: list[str] = []
        for argument, following in zip_longest(args, args[1:], fillvalue="--"):
            complete.append(argument)
            name = f"--{_underscores(argument[2:])}" if argument.startswith("--") else ""
            if name in switches and following.startswith("--"):
                complete.append("true")
        return super().parse_args(ctx, complete)


class _Commands(TyperGroup):
    """The commands by name and summary; the one that is called is imported then."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, _load(name), rest


def _load(name: str) -> Any:
    own = name.replace("-", "_")
    function = getattr(importlib.import_module(f"gvpo.cli.{own}"), own)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command)(function)
    return typer.main.get_command(app)


def _group() -> Any:
    settings = {"help_option_names": ["-h", "--help"], "token_normalize_func": _underscores}
    app = typer.Typer(cls=_Commands, context_settings=settings, add_completion=False, rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_gvpo)
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(lambda: None)
    return typer.main.get_command(app)


def _gvpo(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Post-train language models by regression onto rewards (GVPO, arXiv 2504.19599)."""
    if version:
        print(f"gvpo {importlib.metadata.version('gvpo')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def _underscores(option: str) -> str:
    """`--learning-rate` is `--learning_rate`: flags are spelled as config fields, but both spellings are understood."""
    return option.replace("-", "_")


def _explain(name: str, error: Exception) -> str:
    option = getattr(error, "option_name", None)
    if type(error).__name__ != "NoSuchOption" or option is None:
        return error.format_message() if isinstance(error, typer.TyperException) else str(error)
    near = getattr(error, "possibilities", None)
    return f"unknown option {option}; " + (f"did you mean {near[0]}?" if near else f"{name} --help lists them")


def _complain(name: str, message: str, code: int) -> int:
    """One line on standard error, whatever a file or a name in the message holds."""
    line = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    print(f"{name}: {line}", file=sys.stderr)
    return code
