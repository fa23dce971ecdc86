"""Runs a solution and then its tests, in the sandbox: `python -I asserts.py SOLUTION TESTS_FILE REPORT_FILE SIZE`.

The two files are numbers of open ones. The first holds a token of SIZE bytes and the tests; neither is read before it
is needed, the token last. Only a run that comes to the end of its tests writes it to the second.
"""

from __future__ import annotations

import ast
import builtins
import os
import sys
import types


def main() -> None:
    # Names that the solution cannot change: its own are looked up in the modules, these are local.
    live, genuine = builtins.__dict__, dict(builtins.__dict__)
    parse, walk, pread, write, leave, stat = ast.parse, ast.walk, os.pread, os.write, os._exit, os.fstat
    path, source, report, size = sys.argv[1], *map(int, sys.argv[2:])
    sys.argv[:] = [path]
    solution = sys.modules["solution"] = types.ModuleType("solution")
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), "solution.py", "exec", dont_inherit=True), vars(solution))
    live.update(genuine)
    tests = pread(source, stat(source).st_size - size, size).decode()
    called = {
        node.func.id for node in walk(parse(tests)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = {**vars(solution), "__name__": "tests"}
    del names["__builtins__"]
    # A solution that defines its own `abs` must not change what the tests mean by it; one whose task is to write
    # `sum` is called by no other name.
    if any(name in names and name not in genuine for name in called):
        names = {name: value for name, value in names.items() if name not in genuine or name == "__name__"}
    exec(compile(tests, "tests.py", "exec", dont_inherit=True), names)
    write(report, pread(source, size, 0))
    leave(0)


main()
