"""The reward for code: the model's Python is run with the row's tests, in a sandbox (`gvpo.rewards.sandbox`)."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.ready import Texts, completion_text
from gvpo.rewards.sandbox import Limits, Run, SandboxFailure, passes, run_program

PARALLEL = 4
DEFAULT = Limits()

# Both are anchored to the start of a line, and no part can match what the next one could: linear.
_OPENING = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)\b[^\n]*(?:\n|\Z)", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(r"^[ \t]*```", re.MULTILINE)


def code_accuracy(
    *, completions: Texts | None, tests: Sequence[Any], limits: Limits = DEFAULT, **columns: Any
) -> list[float | None]:
    """1.0 where the completion's code passes all of the row's `tests` within the limits, else 0.0.

    The code is the last fenced block marked python, py or python3 after the last `</think>` (up to the end where it
    is not closed), else the whole text. `tests` is one of

    - a string of Python statements, at whose top level something is asserted or called. They run after the code, in
      the same interpreter, and must come to their end. The module `solution` is the code.
    - a list of `{"input": stdin, "output": stdout}`. The code runs as a program once for each; it must end with status
      0 and print that output, white space at the ends of lines and at the end apart.

    None where the row has no tests, or the sandbox itself failed (also warned of, once for each cause, and counted
    in the metric `code_accuracy/no_verdict`). Code that takes too long or too much memory is wrong: 0.0. One process
    for each member, `PARALLEL` at a time. `functools.partial(code_accuracy, limits=Limits(...))` sets other limits.

    Raises UserError for tests of another form or without an assertion, and where this machine allows no sandbox: the
    environment variable GVPO_CODE_SANDBOX=limits does without namespaces, and with them without a cut-off network.
    """
    if completions is None:
        raise UserError("reward 'code_accuracy' reads texts, and these completions are ids alone: give a tokenizer")
    if not isinstance(limits, Limits):
        raise UserError("reward 'code_accuracy': 'limits' is its own argument: rename the dataset's column")
    rows = [checked_tests(row) for row in tests]
    codes = [_code(completion_text(completion)) for completion in completions]
    with ThreadPoolExecutor(PARALLEL) as pool:
        verdicts = list(pool.map(lambda job: _verdict(job[0], job[1], limits), zip(codes, rows, strict=True)))
    if log_metric := columns.get("log_metric"):
        failures = sum(verdict is None and row is not None for verdict, row in zip(verdicts, rows, strict=True))
        log_metric("code_accuracy/no_verdict", failures)
    return verdicts


def checked_tests(tests: Any) -> str | list[tuple[str, str]] | None:
    """The tests of one row: statements, pairs of input and output, or None; UserError for anything else."""
    if tests is None:
        return None
    if isinstance(tests, str):
        _check_statements(tests)
        return tests
    if not isinstance(tests, Sequence) or not tests:
        raise UserError(f"column 'tests': {_shown(tests)}: give Python statements, or a list of input and output pairs")
    return [_pair(pair) for pair in tests]


def _pair(pair: Any) -> tuple[str, str]:
    if isinstance(pair, Mapping) and isinstance(pair.get("input"), str) and isinstance(pair.get("output"), str):
        return pair["input"], pair["output"]
    raise UserError(f"column 'tests': {_shown(pair)}: a pair is {{'input': text, 'output': text}}")


@lru_cache(maxsize=4096)
def _check_statements(tests: str) -> None:
    where = f"column 'tests': {_shown(tests)}"
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is not Python ({str(error).splitlines()[0]}): correct it") from None
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for statement in tree.body if not isinstance(statement, definitions) for node in ast.walk(statement)]
    if not any(isinstance(node, ast.Assert | ast.Call | ast.Raise) for node in nodes):
        raise UserError(f"{where} asserts and calls nothing outside definitions, so that all code would pass: call it")
    for name in _imported(nodes):
        if name != "solution" and importlib.util.find_spec(name) is None:
            raise UserError(f"{where} imports {name!r}, which is not installed: install it, or drop the row")


def _imported(nodes: Sequence[ast.AST]) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _code(text: str) -> str:
    text = text.rpartition("</think>")[2]
    opening = None
    for opening in _OPENING.finditer(text):  # noqa: B007
        pass
    if opening is None:
        return text
    closing = _CLOSING.search(text, opening.end())
    return textwrap.dedent(text[opening.end() : closing.start() if closing else None])


def _verdict(code: str, tests: str | list[tuple[str, str]] | None, limits: Limits) -> float | None:
    if tests is None:
        return None
    try:
        if isinstance(tests, str):
            return float(passes(code, tests, limits))
        # More than this is another output, even if it were white space.
        inputs = [(given, 4 * len(expected.encode(errors="replace")) + 4096) for given, expected in tests]
        runs = run_program(code, inputs, limits)
    except SandboxFailure as failure:
        warnings.warn(f"code_accuracy has no verdict where its sandbox failed: {failure}", stacklevel=2)
        return None
    right = [_is_right(run, output) for run, (_, output) in zip(runs, tests, strict=False)]
    return float(len(right) == len(tests) and all(right))


def _is_right(run: Run, output: str) -> bool:
    return run.status == 0 and run.output is not None and _lines(run.output) == _lines(output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
