from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import resolve_rewards, sandbox, score_groups
from gvpo.rewards.code import _code as code_of
from gvpo.rewards.code import code_accuracy
from gvpo.rewards.sandbox import Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\nassert double(-1) == -2"
SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "40 2", "output": "42"}]
# Room for a start on a machine that is busy; no test waits for it.
QUICK = Limits(seconds=8, cpu_seconds=1)


@cache
def refused() -> bool:
    """Whether this kernel allows no sandbox of namespaces, the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(sandbox.MODES, raising=False)
        try:
            return not sandbox.passes("", "pass", Limits())
        except UserError:
            return True


@pytest.fixture(params=["namespaces", "limits"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(sandbox.MODES, request.param)
    if request.param == "namespaces" and refused():
        pytest.skip("this kernel allows no user namespaces")
    return request.param


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sandbox.MODES, raising=False)
    if refused():
        pytest.skip("this kernel allows no user namespaces")


@pytest.fixture
def either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default where the kernel allows it; for tests that are not about the sandbox."""
    monkeypatch.setenv(sandbox.MODES, "limits" if refused() else "namespaces")


def judged(codes: str | list[str], tests: Any, limits: Limits = QUICK) -> Any:
    """The rewards of some codes, or the reward of one; `tests` as a list are those of each."""
    completions = [codes] if isinstance(codes, str) else codes
    rows = tests if isinstance(codes, list) and isinstance(tests, list) else [tests] * len(completions)
    rewards = code_accuracy(completions=list(map(textwrap.dedent, completions)), tests=rows, limits=limits)
    return rewards[0] if isinstance(codes, str) else rewards


def test_right_and_wrong_code(mode: str):
    codes = [DOUBLE, DOUBLE.replace("2", "3"), SUM, SUM.replace("+", "-"), DOUBLE]
    rewards = code_accuracy(completions=codes, tests=[TESTS, TESTS, PAIRS, PAIRS, None])
    assert rewards == [1.0, 0.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (f"Here:\n```python\n{DOUBLE}```\nDone.", DOUBLE),
        (f"```python\nno\n```\nBetter:\n```py\n{DOUBLE}```", DOUBLE),
        (f"```python\n{DOUBLE}```\nOr not:\n```Python3\nno\n```", "no\n"),
        (f"```python\n{DOUBLE}```\nprints\n```\n4\n```", DOUBLE),  # a block of another kind is no code
        (f"<think>\n```python\nno\n```\n</think>\n```python\n{DOUBLE}", DOUBLE),  # never closed
        (f"<think>\n```python\n{DOUBLE}```\n</think>\nI gave it above.", "\nI gave it above."),
        (f"1. so:\n   ```python\n{textwrap.indent(DOUBLE, '   ')}   ```", DOUBLE),
        (f"see ```python\n{DOUBLE}```", f"see ```python\n{DOUBLE}```"),  # a fence starts a line
        (f"```pythonic\n{DOUBLE}```", f"```pythonic\n{DOUBLE}```"),
        ("```python", ""),
        ("I cannot.", "I cannot."),
        ("", ""),
    ],
)
def test_which_text_is_the_code(completion: str, code: str):
    assert code_of(completion) == code


@pytest.mark.parametrize(
    "text", ["```python\n" * 200_000, "`" * 1_000_000, " " * 1_000_000 + "```", "```py " * 200_000]
)
def test_the_code_in_huge_texts(text: str):
    assert len(code_of(text)) <= len(text)


@pytest.mark.usefixtures("either")
def test_texts_that_are_no_code():
    assert judged(["I cannot.", "", "\x00", "```python\n", "\\" * 1_000_000, "(" * 100_000], TESTS) == [0.0] * 6


CHEATS = {
    "an exit": "import sys; sys.exit(0)",
    "a hard exit": "import os; os._exit(0)",
    "an exit in the function": "def double(x): raise SystemExit(0)",
    "a hard exit in the function": """
        import os
        def double(x): os._exit(0)
    """,
    "a verdict of its own": """
        import os
        for file in range(20):
            try: os.write(file, b'1.0 passed OK')
            except OSError: pass
        os._exit(0)
    """,
    "a printed verdict": "print('all tests passed'); raise SystemExit",
    "a name of the tests": """
        def abs(x): return 0
        def double(x): return 5
    """,
    "a builtin": """
        import builtins
        builtins.abs = lambda x: 0
        def double(x): return 5
    """,
    "no exceptions": """
        import builtins, sys
        builtins.AssertionError = SystemExit
        sys.excepthook = print
        def double(x): return 5
    """,
    "no compiling": """
        import builtins
        builtins.compile = lambda *a, **k: (lambda: 0).__code__
        def double(x): return 5
    """,
    "an exit meanwhile": """
        import threading, os, time
        threading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()
        def double(x): time.sleep(20)
    """,
    "a handler": """
        import atexit, os
        atexit.register(os._exit, 0)
        def double(x): return 5
    """,
    "a fork": """
        import os
        if os.fork(): os._exit(0)
        def double(x): return 5
    """,
    "the end of its parent": """
        import os, signal
        os.kill(os.getppid(), signal.SIGKILL)
        def double(x): return 5
    """,
}


def test_cheap_tricks_do_not_pass(mode: str):
    verdicts = judged(list(CHEATS.values()), "assert abs(double(2) - 4) < 1e-9")
    assert dict(zip(CHEATS, verdicts, strict=True)) == dict.fromkeys(CHEATS, 0.0)


@pytest.mark.usefixtures("either")
def test_a_solution_may_be_named_like_a_builtin():
    assert judged("def sum(a, b): return a + b", "assert sum(1, 2) == 3") == 1.0


@pytest.mark.usefixtures("either")
def test_the_outputs_that_are_wanted_are_nowhere_to_be_found():
    search = """
        import gc, os
        places = [gc.get_objects(), dict(os.environ), open("/proc/self/cmdline").read()]
        places += [open(f"{folder}/{name}").read() for folder, _, names in os.walk("..") for name in names]
        backwards = "1174-eldeen"
        print(backwards[::-1] if backwards[::-1] in str(places) else "none")
    """
    found, nothing = [{"input": "", "output": "needle-4711"}], [{"input": "", "output": "none"}]
    assert judged([search, search], [found, nothing]) == [0.0, 1.0]


PROGRAMS = [
    ("print('a  \\nb\\n\\n')", [{"input": "", "output": "a\nb"}], 1.0),
    ("print(' a')", [{"input": "", "output": "a"}], 0.0),
    ("print('a\\n\\nb')", [{"input": "", "output": "a\nb"}], 0.0),
    ("print(1.0)", [{"input": "", "output": "1"}], 0.0),
    ("print('\u00e9', input())", [{"input": "\u2264", "output": "\u00e9 \u2264"}], 1.0),
    ("print(3); raise ValueError", [{"input": "", "output": "3"}], 0.0),
    ("import sys; print(3); sys.exit()", [{"input": "", "output": "3"}], 1.0),
    ("import sys; print(3); sys.exit(1)", [{"input": "", "output": "3"}], 0.0),
    ("import sys; print('log', file=sys.stderr); print(3)", [{"input": "", "output": "3"}], 1.0),
    ("if __name__ == '__main__':\n    print(3)", [{"input": "", "output": "3"}], 1.0),
    ("print(len(open(0).read()))", [{"input": "x" * 300_000, "output": "300000"}], 1.0),
    ("print('x' * 300_000)", [{"input": "", "output": "x" * 300_000}], 1.0),
    ("print('x' * 10)", [{"input": "", "output": "x" * 9}], 0.0),
    ("print(3, end='\\n' * 1000)", [{"input": "", "output": "3"}], 1.0),
    ("print(3, end='\\n' * 100_000)", [{"input": "", "output": "3"}], 0.0),  # much more than was asked for
    (SUM, [*PAIRS, {"input": "1 1", "output": "3"}], 0.0),
    (SUM, [*PAIRS, {"input": "no", "output": ""}], 0.0),
    # Nothing is left of one run for the next.
    ("import os\nprint(os.path.exists('x'))\nopen('x', 'w')", [{"input": "", "output": "False"}] * 2, 1.0),
]


@pytest.mark.usefixtures("either")
def test_programs():
    codes, pairs, rewards = map(list, zip(*PROGRAMS, strict=True))
    verdicts = judged(codes, pairs)
    assert list(zip(codes, verdicts, strict=True)) == list(zip(codes, rewards, strict=True))


EXCESSES = [
    "import time; time.sleep(100)",
    "x = 'x' * (2 << 30)",
    "x = []\nwhile True: x.append('x' * 1_000_000)",
    "import sys\ndef f(): f()\nsys.setrecursionlimit(1 << 30)\nf()",
    "f = open('big', 'wb')\nwhile True: f.write(b'x' * 1_000_000)",
    "import ctypes; ctypes.string_at(0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "input()",
]


def test_what_takes_too_much_is_wrong(mode: str):
    verdicts = judged(EXCESSES, "str()", Limits(seconds=1, memory_mb=256, file_mb=2))
    assert dict(zip(EXCESSES, verdicts, strict=True)) == dict.fromkeys(EXCESSES, 0.0)


@pytest.mark.usefixtures("either")
def test_processor_time():
    (run,) = sandbox.run_program("while True: pass", [("", 0)], Limits(seconds=100, cpu_seconds=1))
    assert run == sandbox.Run("exit", -signal.SIGKILL, "")


@pytest.mark.usefixtures("either")
def test_memory():
    runs = [sandbox.run_program("bytes(300 << 20)", [("", 0)], Limits(memory_mb=size)) for size in (256, 512)]
    assert [run.status for (run,) in runs] == [1, 0]


def test_no_process_outlives_its_verdict(mode: str):
    marker = f"{os.getpid()}.{time.monotonic_ns()}"
    leave = f"""
        import os
        for i in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv("/bin/sleep", ["sleep", "{marker}"])
                os._exit(0)
        def double(x): return 2 * x
    """
    assert judged(leave, TESTS) == 1.0
    assert running(marker) == []


@pytest.mark.usefixtures("namespaces")
def test_processes_without_end():
    marker = f"{os.getpid()}.{time.monotonic_ns()}"
    bomb = f"""
        import os
        for i in range(200):
            if os.fork() == 0:
                os.execv("/bin/sleep", ["sleep", "{marker}"])
        def double(x): return 2 * x
    """
    assert judged(bomb, TESTS, Limits(seconds=8, processes=20)) == 0.0
    assert running(marker) == []


def signalled(number: int) -> Any:
    """The verdict on code that is right, after a signal to its watchers."""
    code = "import time\ntime.sleep(1)\ndef double(x): return 2 * x"
    with ThreadPoolExecutor(1) as thread:
        verdict = thread.submit(judged, code, TESTS)
        wait_for(lambda: len(ours("asserts.py")) > 0)
        for watcher in ours("inside.py"):
            watcher.send_signal(number)
        return verdict.result()


def ours(program: str) -> list[psutil.Process]:
    """The processes that this one has started, and theirs, that run a program of the sandbox."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if any(part.endswith(f"/{program}") for part in process.cmdline()) else []
    return found


@pytest.mark.usefixtures("either")
def test_a_scheduler_that_tells_all_processes_to_end_changes_no_verdict():
    assert signalled(signal.SIGTERM) == 1.0


@pytest.mark.usefixtures("namespaces")
def test_a_watcher_that_the_system_kills_gives_no_verdict():
    with pytest.warns(UserWarning, match=r"no verdict where its sandbox failed: its watcher was killed \(SIGKILL\)"):
        assert signalled(signal.SIGKILL) is None


def test_no_process_outlives_the_trainer(mode: str, tmp_path: Path):
    marker = f"{os.getpid()}.{time.monotonic_ns()}"
    code = f"import os; os.execv('/bin/sleep', ['sleep', '{marker}'])"
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from gvpo.rewards.code import code_accuracy\n"
            "code_accuracy(completions=[sys.argv[1]], tests=['assert True'])",
            code,
        ],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # a process that is killed leaves its empty folder
    )
    wait_for(lambda: any("sleep" in commandline(entry)[:20] for entry in running(marker)))
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not running(marker))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(marker: str) -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal() and marker in commandline(entry)]


def commandline(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_text()
    except OSError:  # gone meanwhile
        return ""


def test_nothing_of_ours_reaches_the_code(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    look = """
        import os, sys
        assert set(os.environ) <= {"HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}, os.environ
        assert os.path.expanduser("~") == os.getcwd() and os.listdir() == []
        assert sys.stdin.read() == "" and sys.flags.isolated
        open("mine", "w").write("x")
        assert open("mine").read() == "x"
    """
    assert judged(look, "assert True") == 1.0


def test_the_folder_is_removed(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert judged("open('left', 'w')\nimport os; os.mkdir('x'); os.chmod('.', 0)", "assert True") == 1.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("namespaces")
def test_there_is_no_network_and_nothing_else_to_write_or_to_signal(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        escape = f"""
            import os, socket
            def refused(function, *arguments):
                try: function(*arguments)
                except OSError: return True
            assert refused(socket.create_connection, ("127.0.0.1", {port}), 1)
            assert refused(open, {str(kept)!r}, "w") and refused(os.remove, {str(kept)!r})
            assert refused(open, {str(tmp_path / "new")!r}, "w")
            assert refused(os.kill, {os.getpid()}, 0)
            assert not os.path.exists("/proc/{os.getpid()}/environ")
            import ctypes
            libc = ctypes.CDLL(None)
            assert libc.mount(None, b"/", None, 32 | 4096, None) == -1  # MS_REMOUNT | MS_BIND: writable again
            assert libc.umount2(os.path.dirname(os.getcwd()).encode(), 2) == -1
        """
        assert judged(escape, "assert True") == 1.0
    assert kept.read_text() == "kept"


DENIED = """
echo 0 > /proc/sys/user/max_user_namespaces
exec {python} -c '
from gvpo.rewards.code import code_accuracy
from gvpo.errors import UserError
try:
    print(code_accuracy(completions=["x = 1"], tests=["assert x == 1"]))
except UserError as error:
    print(error)
'
"""


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("mode", [None, "limits"])
def test_a_kernel_that_refuses(mode: str | None):
    # A namespace whose own limit is no further one: what a container with the usual filter looks like.
    environment = {name: value for name, value in os.environ.items() if name != sandbox.MODES}
    script = DENIED.format(python=sys.executable)
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script],
        env=environment | ({sandbox.MODES: mode} if mode else {}),
        capture_output=True,
        text=True,
    )
    if "unshare" in run.stderr:
        pytest.skip(run.stderr)
    if mode:
        assert run.stdout == "[1.0]\n"
    else:
        assert run.stdout.startswith("code_accuracy: this machine does not let it cut the code off from the network")
        assert "unshare: " in run.stdout and run.stdout.endswith("and set GVPO_CODE_SANDBOX=limits\n")


def test_an_unknown_mode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(sandbox.MODES, "off")
    with pytest.raises(UserError, match=r"GVPO_CODE_SANDBOX is 'off': set 'limits'"):
        judged(DOUBLE, TESTS)


@pytest.mark.usefixtures("either")
def test_a_failing_sandbox_gives_no_verdict(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_INSIDE", Path("/nowhere/inside.py"))
    logged: dict[str, float] = {}
    with pytest.warns(UserWarning, match=r"no verdict where its sandbox failed: .*No such file"):
        rewards = code_accuracy(
            completions=[DOUBLE, DOUBLE],
            tests=[TESTS, None],
            log_metric=lambda name, value: logged.update({name: value}),
        )
    assert rewards == [None, None]
    assert logged == {"code_accuracy/no_verdict": 1}


@pytest.mark.usefixtures("either")
def test_a_sandbox_that_hangs_gives_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hanging = tmp_path / "inside.py"
    hanging.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "_INSIDE", hanging)
    monkeypatch.setattr(sandbox, "GRACE", 0.1)
    with pytest.warns(UserWarning, match="it did not end in time"):
        assert judged(DOUBLE, TESTS, Limits(seconds=0.1)) is None


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert double(2) ==", "is not Python"),
        ("", "asserts and calls nothing"),
        ('[{"input": "1", "output": "2"}]', "asserts and calls nothing"),
        ("def test():\n    assert double(2) == 4", "asserts and calls nothing"),
        (
            "import nosuchmodule\nassert nosuchmodule.same(double(2), 4)",
            "imports 'nosuchmodule', which is not installed",
        ),
        ([], "give Python statements, or a list"),
        (7, "give Python statements, or a list"),
        ([{"input": "1"}], "a pair is"),
        ([{"input": 1, "output": "2"}], "a pair is"),
        (["assert double(2) == 4"], "a pair is"),
    ],
)
def test_tests_that_are_none(tests: Any, message: str):
    with pytest.raises(UserError, match=f"column 'tests': .*{message}"):
        judged(DOUBLE, tests)


@pytest.mark.usefixtures("either")
def test_tests_may_import_the_solution_and_define_things():
    tests = "from solution import double\ndef check(f):\n    assert f(2) == 4\ncheck(double)"
    assert judged(DOUBLE, tests) == 1.0
    assert judged(DOUBLE.replace("2", "3"), tests) == 0.0


@pytest.mark.usefixtures("either")
def test_dataclasses_and_future_imports_work_in_a_solution():
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int"
    assert judged(code, "assert P(1) == P(1) and P(1).x == 1") == 1.0


@pytest.mark.usefixtures("either")
def test_it_is_called_as_the_trainer_calls_it():
    prompt = [{"role": "user", "content": "Double!"}]
    group = Group(prompt, [Completion(DOUBLE), Completion("no")], columns={"tests": TESTS})
    other = Group("Sing!", [Completion("La")])
    function = partial(code_accuracy, limits=Limits(seconds=20))
    assert score_groups([group, other], resolve_rewards(function), None).rewards == [[1.0, 0.0], [None]]
    with pytest.raises(UserError, match="give a tokenizer"):
        score_groups(
            [Group(None, [Completion(token_ids=[1])], prompt_ids=[1])],
            resolve_rewards(code_accuracy),
            None,
            columns=["tests"],
        )
    with pytest.raises(UserError, match="rename the dataset's column"):
        code_accuracy(completions=[DOUBLE], tests=[TESTS], limits=[3])  # pyright: ignore[reportArgumentType]
