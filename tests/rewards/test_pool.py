from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty import CAUSE, MISDEEDS

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.rewards import guarded, resolve_rewards, score_groups
from gvpo.rewards.fill import fill_rewards
from gvpo.rewards.limits import Limits
from gvpo.rewards.outputs import Output
from gvpo.rewards.workers import process
from gvpo.rewards.workers.pool import GIVE_UP, PooledFunction, RewardPool

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def found_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("FAULTY_OF", str(os.getpid()))  # whose the processes are: other tests may run beside these


@pytest.fixture
def pool() -> Iterator[Callable[..., Any]]:
    """Makes the functions of tests/rewards/faulty.py, as resolved; what they leave is looked for at the end."""
    before, pools = descendants(), []

    def make(*names: str, **limits: Any) -> Any:
        found = resolve_rewards(
            [f"faulty:{name}" for name in names], Limits(**{"seconds": 20.0, "workers": 2, **limits})
        )
        pools.append(found[0].function.pool)
        return found

    yield make
    for one in pools:
        one.close()
    assert descendants() <= before
    assert not sleepers()


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def sleepers() -> list[int]:
    """The daemons of `faulty`, wherever they hang in the tree of processes."""
    found = []
    for one in psutil.process_iter(["cmdline"]):
        if one.info["cmdline"] == ["sleep", "3600.5"] and one.status() != psutil.STATUS_ZOMBIE and is_ours(one):
            found.append(one.pid)
    return found


def is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.environ().get("FAULTY_OF") == str(os.getpid())
    return False


def group(*texts: str, prompt: Any = "p", **columns: Any) -> Group:
    return Group(prompt, [Completion(text) for text in texts], columns=columns)


def submit(function: PooledFunction, text: str) -> Future[Output]:
    return function.submit("obedient", {"completions": [text]}, 1)


def answer(future: Future[Output]) -> Any:
    """The value, or the cause for which there is none."""
    output = future.result()
    assert (output.values == [None]) == bool(output.failures)
    return output.failures[0].cause if output.failures else output.values[0]


def ask(function: PooledFunction, text: str) -> Any:
    return answer(submit(function, text))


class TestFaults:
    def test_two_thousand_calls_of_which_one_in_five_goes_wrong_from_four_threads(self, pool: Any) -> None:
        """Every good call is right, every bad one None with its cause, no process is left, and the time is bounded."""
        seconds, calls, workers = 2.0, 2000, 16
        (found,) = pool("obedient", seconds=seconds, memory=0.15, workers=workers)
        draw = random.Random(0)
        # Fewer of those that take all the time there is.
        often = [verb for verb in sorted(CAUSE) for _ in range(1 if CAUSE[verb] == "hang" else 6)]
        bad = [draw.choice(often) if draw.random() < 0.2 else None for _ in range(calls)]
        texts = [f"{verb or 'say'} {number}" for number, verb in enumerate(bad)]
        expected = [float(number) if verb is None else CAUSE[verb] for number, verb in enumerate(bad)]
        assert 350 < sum(verb is not None for verb in bad) < 450 and set(bad) - {None} == set(CAUSE)
        started = time.monotonic()

        def ask_every_fourth(first: int) -> list[Any]:
            asked = [submit(found.function, text) for text in texts[first::4]]
            return [answer(future) for future in asked]

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(ask_every_fourth, range(4)))
        assert [answers[number % 4][number // 4] for number in range(calls)] == expected
        # Each bad call may take its whole limit, twice, and a second for a new worker.
        assert time.monotonic() - started < 2 * (seconds + 1) * sum(verb is not None for verb in bad) / workers

    @pytest.mark.parametrize("verb", sorted(MISDEEDS.keys() - CAUSE.keys()))
    def test_what_is_no_fault_is_answered_and_leaves_nothing_behind(self, pool: Any, verb: str) -> None:
        (found,) = pool("obedient", workers=1)
        assert [ask(found.function, f"{verb} {n}") for n in (1, 2, 3)] == [1.0, 2.0, 3.0]

    def test_members_that_came_with_a_bad_one_keep_their_rewards(self, pool: Any) -> None:
        functions = pool("obedient", "lonely", seconds=1.0)
        groups = [group("say 1", "crash 2", "say 3"), group("say 4", "say 5"), group("exit 6")]
        report = score_groups(groups, functions, None)
        assert report.per_function["obedient"] == [[1.0, None, 3.0], [4.0, 5.0], [None]]
        assert {place: str(why) for place, why in report.failures["obedient"].items()} == {
            1: "crash: the process was ended by SIGSEGV",
            5: "exit: the function called sys.exit(3)",
        }
        # Where nothing fails, a call is for a group.
        assert report.per_function["lonely"] == [[3.0] * 3, [2.0] * 2, [1.0]]
        assert report.rewards == [[4.0, 3.0, 6.0], [6.0, 7.0], [1.0]]

    def test_a_failure_is_kept_with_the_completion(self, pool: Any) -> None:
        (asked,) = groups = [group("say 1", "hang 2")]
        fill_rewards(groups, pool("obedient", seconds=0.2), None)
        good, bad = asked.completions
        assert (good.reward, bad.reward) == (1.0, None)
        assert bad.meta == {"rewards": {}, "reward_failures": {"obedient": "hang: no answer within 0.2 s"}}
        assert good.meta == {"rewards": {"obedient": 1.0}}

    def test_a_function_that_always_fails_stops_the_run(self, pool: Any) -> None:
        functions = pool("obedient", workers=1)

        def bad() -> Group:
            return group(*["exit 1"] * 8)

        with pytest.raises(UserError) as refused:
            score_groups([bad(), bad(), bad()], functions, None)
        assert str(refused.value) == (
            "reward function 'obedient' gave no answer for 24 completions in a row, for the last: exit: the "
            "function called sys.exit(3); fix the function, or raise the limit (reward_timeout, reward_memory)"
        )
        # One prompt, however many completions it has, and answers in between: no reason to stop.
        assert score_groups([group(*["exit 1"] * (GIVE_UP + 1))], functions, None).rewards == [[None] * (GIVE_UP + 1)]
        often = score_groups([bad(), group("say 2"), bad(), group("say 3", "exit 1"), bad()], functions, None)
        assert often.rewards == [[None] * 8, [2.0], [None] * 8, [3.0, None], [None] * 8]

    def test_what_a_member_has_left_behind_is_not_held_against_the_next(self, pool: Any) -> None:
        functions = pool("obedient", workers=1)
        for _ in range(3):
            assert ask(functions[0].function, "alarm 1") == 1.0
            time.sleep(0.3)
            assert ask(functions[0].function, "say 2") == 2.0

    def test_output_is_passed_on_up_to_a_limit(self, pool: Any, capfd: pytest.CaptureFixture[str]) -> None:
        (found,) = pool("obedient")
        assert ask(found.function, "print a little 1") == 1.0
        assert capfd.readouterr() == ("", "seen\n")
        (fresh,) = pool("obedient")
        assert ask(fresh.function, "print 1") == "output"
        out, err = capfd.readouterr()
        assert out == "" and err.endswith(" ...\n") and len(err) == process.SHOWN_OUTPUT + len(" ...\n")


class TestCalls:
    def test_arguments_logs_and_async_functions_cross(self, pool: Any) -> None:
        functions = pool("logging", "waiting", "told")
        groups = [group("ab", "none", prompt="pp", answer=7), group("c", prompt="ppp", answer=8)]
        report = score_groups(groups, functions, [1.0, 1.0, 0.0], trainer_state={"step": 5})
        assert report.per_function == {
            "logging": [[1.0, None], [1.0]],
            "waiting": [[2.0, 4.0], [1.0]],
            "told": [[275.0, 275.0], [385.0]],
        }
        assert report.extra == {"text": ["AB", "NONE", "C"]}
        # The mean over calls, as where functions are called here: (2 + 1) / 2.
        assert report.metrics == {"members": 1.5}

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            ("raising", "a", "reward function 'raising' raised RuntimeError: no judge at home ("),
            ("short", "a", "reward function 'short' returned 0 values, expected 2: return one number"),
            ("wrong", "a", "reward function 'wrong' returned 'three' (str) as value 0, group 0, member 0"),
            (
                "wrong",
                "nan",
                "reward function 'wrong' returned nan as value 0, group 0, member 0 (counted from 0), prompt",
            ),
        ],
    )
    def test_mistakes_of_the_function_are_errors_as_in_this_process(
        self, pool: Any, name: str, text: str, line: str
    ) -> None:
        pooled, here = pool(name), resolve_rewards([f"faulty:{name}"])
        lines = []
        for functions in (pooled, here):
            with pytest.raises(UserError) as refused:
                score_groups([group(text, text)], functions, None)
            lines.append(str(refused.value))
        assert lines[0] == lines[1] and lines[0].startswith(line)

    def test_arguments_are_checked_against_the_signature(self, pool: Any) -> None:
        with pytest.raises(UserError, match="'told' needs 'answer', which is neither"):
            score_groups([group("a")], pool("told"), None)

    def test_a_column_that_cannot_cross_is_named(self, pool: Any) -> None:
        with pytest.raises(
            UserError, match=r"'lonely': the arguments cannot be sent to another process .*reward_workers to 0"
        ):
            score_groups([group("a", lock=threading.Lock())], pool("lonely"), None)

    def test_workers_work_side_by_side(self, pool: Any) -> None:
        """Two calls of 0.2 s overlap: each ends before the other has been under way for 0.4 s."""
        report = score_groups([group("a"), group("b")], pool("slow"), None)
        ((first,), (second,)) = report.rewards
        assert first is not None and second is not None and abs(first - second) < 0.2

    def test_from_a_running_event_loop(self, pool: Any) -> None:
        functions = pool("waiting")

        async def main() -> Any:
            inside = score_groups([group("abc")], functions, None).rewards
            future = functions[0].function.submit("waiting", {"completions": ["ab"]}, 1)
            return inside, (await asyncio.wrap_future(future)).values

        assert asyncio.run(main()) == ([[3.0]], [2.0])

    def test_after_a_fork(self, pool: Any) -> None:
        """Data loaders fork: threads do not come along, and the parent's workers are not the child's to use or end."""
        functions = pool("lonely")
        assert score_groups([group("a")], functions, None).rewards == [[1.0]]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if score_groups([group("a", "b")], functions, None).rewards == [[2.0, 2.0]] else 2
                functions[0].function.pool.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert score_groups([group("a")], functions, None).rewards == [[1.0]]

    def test_as_a_reward_function_of_another_trainer(self, pool: Any, caplog: pytest.LogCaptureFixture) -> None:
        function = guarded("faulty:obedient", seconds=0.5, workers=1)
        assert guarded("faulty:obedient", seconds=0.5, workers=1) is function
        try:
            assert function(prompts=["p"] * 3, completions=["say 1", "hang 2", "crash 3"]) == [1.0, None, None]
            assert [record.getMessage() for record in caplog.records] == [
                "reward function 'obedient': no answer for 1 of 3: crash",
                "reward function 'obedient': no answer for 1 of 3: hang",
            ]
            metrics: dict[str, float] = {}
            logging = pool("logging")[0].function
            assert logging(completions=["a", "none"], log_metric=metrics.__setitem__) == [1.0, None]
            assert metrics == {"members": 2.0}
            lonely = pool("lonely")[0].function
            assert function(completions=[f"say {n}" for n in range(20)], answers=range(20)) == [*map(float, range(20))]
            with pytest.raises(UserError, match="given 2 completions, and 3 values of 'answers'"):
                lonely(completions=["a", "b"], answers=(1, 2, 3))
            assert lonely(completions=["a"] * 19, answers=[1] * 19) == [8.0] * 16 + [3.0] * 3
            assert lonely(completions=[]) == []
        finally:
            function.pool.close()


class TestLife:
    def test_nothing_outlives_a_pool_that_is_dropped(self) -> None:
        before = descendants()
        functions = resolve_rewards(["faulty:obedient"], Limits(seconds=20.0, workers=2))
        assert ask(functions[0].function, "daemon 1") == 1.0
        assert len(descendants()) > len(before) + 1
        del functions
        gc.collect()
        assert descendants() <= before and not sleepers()

    @pytest.mark.parametrize("ending", ["os._exit(0)", "os.kill(os.getpid(), 9)", "sys.exit()", "raise ValueError"])
    def test_nothing_outlives_the_process_that_called(self, ending: str) -> None:
        """However it ends, and though a worker hangs in a call."""
        program = f"""
            import os, sys, time
            from gvpo.rewards import resolve_rewards
            from gvpo.rewards.limits import Limits
            (one,) = resolve_rewards(["faulty:obedient"], Limits(seconds=3600, workers=2))
            one.function.submit("f", {{"completions": ["daemon 1"]}}, 1).result()
            one.function.submit("f", {{"completions": ["hang 1"]}}, 1)
            time.sleep(0.1)
            {ending}
        """
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], cwd=HERE, timeout=60, capture_output=True
        )
        assert b"UserError" not in ended.stderr
        deadline = time.monotonic() + 10
        while servers() or sleepers():
            assert time.monotonic() < deadline, "processes were left behind"
            time.sleep(0.05)

    def test_a_server_that_was_killed_is_told_of(self, pool: Any) -> None:
        (found,) = pool("lonely", workers=1)
        assert found.function(completions=["a"]) == [1.0]
        server = found.function.pool._running.server._process
        server.kill()
        server.wait()
        with pytest.raises(UserError, match="the process that reward functions are called from has ended"):
            found.function(completions=["a"])


def servers() -> list[int]:
    return [
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if any("fork_server" in part for part in one.info["cmdline"] or [])
        and "faulty:obedient" in one.info["cmdline"]
        and is_ours(one)
    ]


class TestImports:
    @pytest.mark.parametrize(
        ("source", "line"),
        [
            (
                "import nowhere_to_be_found",
                "importing 'bad' raised ModuleNotFoundError: No module named 'nowhere_to_be",
            ),
            ("1 / 0", "importing 'bad' raised ZeroDivisionError: division by zero ("),
            ("def f(:", "importing 'bad' raised SyntaxError"),
            ("import sys; sys.exit(2)", "importing 'bad' raised SystemExit: 2 ("),
            ("import os; os._exit(5)", "importing 'bad:f': the process ended with exit code 5: fix the module"),
            ("import os; os.kill(os.getpid(), 11)", "importing 'bad:f': the process was ended by SIGSEGV: fix"),
            ("while True: print('x' * 10000)", "importing 'bad:f': it printed more than 1,048,576 bytes: fix"),
            ("import time; time.sleep(3600)", "importing 'bad:f': no answer within 0.5 s: fix the module"),
            (
                "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'?' * 99)\n except OSError: pass",
                "importing 'bad:f'",
            ),
            ("g = 1", "'bad:f': module 'bad' ("),
        ],
    )
    def test_a_module_that_misbehaves_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, line: str
    ) -> None:
        (tmp_path / "bad.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(process, "IMPORT_SECONDS", 0.5 if "sleep" in source else 60.0)
        before = descendants()
        with pytest.raises(UserError) as refused:
            RewardPool(["bad:f"])
        assert line in str(refused.value) and "\n" not in str(refused.value)
        assert descendants() <= before

    def test_a_module_that_forks_is_served_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "forking.py").write_text("import os\nos.fork()\ndef f(completions, **columns): return [1.0]\n")
        monkeypatch.chdir(tmp_path)
        before = descendants()
        pool = RewardPool(["forking:f"], Limits(workers=1))
        assert pool.functions[0](completions=["a"]) == [1.0]
        pool.close()
        assert descendants() <= before

    def test_printing_on_import_is_passed_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "chatty.py").write_text("print('loading')\ndef f(completions, **columns): return [1.0]\n")
        monkeypatch.chdir(tmp_path)
        RewardPool(["chatty:f"], Limits(workers=1)).close()
        assert capfd.readouterr() == ("", "loading\n")


def test_reward_workers_0_calls_in_this_process() -> None:
    (found,) = resolve_rewards(["faulty:pid"], Limits(workers=0))
    assert score_groups([group("a")], [found], None).rewards == [[float(os.getpid())]]
