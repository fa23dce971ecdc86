"""Reward functions in processes that can be killed: a call has a deadline, and what a bad one takes down is replaced.

    functions of a pool -> jobs -> threads, each with a worker process -> Output

A function is imported once, in a process of its own (`fork_server`) from which workers are forked in milliseconds. A
call that hangs, crashes, exits, takes too much memory or prints without end costs its worker and nothing else: members
that were called together are called again one by one, and those that fail alone get no value, with the cause.
"""

from __future__ import annotations

import inspect
import logging
import os
import queue
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.limits import Limits
from gvpo.rewards.outputs import Failure, Output, joined
from gvpo.rewards.workers.process import Failed, ForkServer, Worker

GIVE_UP, FEWEST_CALLS = 20, 3
"""Completions in a row without any answer, of so many calls at least, after which a run is stopped: one prompt may be
such that a verifier fails on all that is said to it."""

_MOST_WORKERS = 32
_TOGETHER = 8

_log = logging.getLogger("gvpo.rewards")


def _ignore(name: str, value: Any) -> None:
    pass


class PooledFunction:
    """A function that a pool calls; as a callable, a reward function like any other, of its module."""

    def __init__(self, pool: RewardPool, place: int, name: str, parameters: Sequence[Sequence[Any]] | None) -> None:
        self.pool, self.place, self.__name__ = pool, place, name
        self.__module__ = pool.entries[place].partition(":")[0]
        if parameters is not None:
            self.__signature__ = inspect.Signature([_parameter(*one) for one in parameters])

    def submit(self, name: str, arguments: Mapping[str, Any], count: int) -> Future[Output]:
        """Have `count` members scored; arguments: by name, a list of one value per member, None, or `trainer_state`.

        name: what messages call the function. The future raises UserError as `worker.call` does, and, of a pool that
        gives up, where `GIVE_UP` members in a row have failed.
        """
        state = arguments.get("trainer_state")
        if hasattr(state, "__dict__"):
            # A worker that unpickled transformers' own class would import torch first.
            arguments = {**arguments, "trainer_state": SimpleNamespace(**vars(state))}
        return self.pool.submit(_Job(Future(), self.place, name, arguments, count))

    def __call__(
        self,
        *,
        log_extra: Callable[[str, list[Any]], Any] = _ignore,
        log_metric: Callable[[str, float], Any] = _ignore,
        **arguments: Any,
    ) -> list[float | None]:
        """The values for all members, a few in each call. Who gets no answer is logged, by cause."""
        arguments, count = _as_lists(arguments)
        parts = [range(start, min(start + _TOGETHER, count)) for start in range(0, count, _TOGETHER)]
        asked = [self.submit(self.__name__, _of_members(arguments, part), len(part)) for part in parts]
        output = joined([future.result() for future in asked])
        for column, values in output.extra.items():
            log_extra(column, values)
        for name, numbers in output.metrics.items():
            for number in numbers:
                log_metric(name, number)
        for cause, failures in sorted(Counter(one.cause for one in output.failures.values()).items()):
            _log.warning("reward function %r: no answer for %d of %d: %s", self.__name__, failures, count, cause)
        for value in output.values:
            if isinstance(value, str):
                raise UserError(f"reward function {self.__name__!r} returned {value}: return a number, or None")
        return [value for value in output.values if not isinstance(value, str)]


def _as_lists(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """All columns as lists, and how many members they have; what is no column stays as it is.

    Raises UserError for columns of different lengths.
    """
    lists = {
        name: value
        if name == "trainer_state" or isinstance(value, str | None) or not hasattr(value, "__len__")
        else list(value)
        for name, value in arguments.items()
    }
    lengths = {name: len(value) for name, value in lists.items() if isinstance(value, list)}
    count = next((lengths[name] for name in ("completions", "completion_ids", "prompts") if name in lengths), 0)
    for name, length in lengths.items():
        if length != count:
            raise UserError(f"a reward function was given {count} completions, and {length} values of {name!r}")
    return lists, count


def _parameter(name: str, kind: int, has_default: bool) -> inspect.Parameter:
    default = None if has_default else inspect.Parameter.empty
    return inspect.Parameter(name, inspect._ParameterKind(kind), default=default)


@dataclass(frozen=True, slots=True)
class _Job:
    future: Future[Output]
    place: int
    name: str
    arguments: Mapping[str, Any]
    count: int

    def of_member(self, member: int) -> _Job:
        alone = _of_members(self.arguments, range(member, member + 1))
        return _Job(self.future, self.place, self.name, alone, 1)


def _of_members(arguments: Mapping[str, Any], members: range) -> dict[str, Any]:
    part = slice(members.start, members.stop)
    return {name: value[part] if isinstance(value, list) else value for name, value in arguments.items()}


class RewardPool:
    """Workers for the functions that `entries` name (`module:function`); usable from any thread, and after a fork.

    They go when the pool is closed or collected, when this process ends, however it ends, and when they misbehave.
    give_up: whether a function of which nothing gets an answer any more ends the run, as `GIVE_UP` says.
    Raises UserError where a module cannot be imported or a function is not there.
    """

    def __init__(self, entries: Sequence[str], limits: Limits | None = None, *, give_up: bool = True) -> None:
        self.entries, self._limits, self._give_up = list(entries), limits or Limits(), give_up
        self._lock = threading.Lock()
        self._start()
        told = self._running.server.functions
        self.functions = [PooledFunction(self, place, *one) for place, one in enumerate(told)]

    def submit(self, job: _Job) -> Future[Output]:
        """Have a job done; see `PooledFunction.submit`."""
        with self._lock:
            if self._running.process != os.getpid():  # threads do not come along with a fork
                self._start()
            elif not self._finalizer.alive:
                raise UserError("the pool of this reward function was closed; make a new one")
        self._running.jobs.put(job)
        return job.future

    @property
    def alive(self) -> bool:
        """Whether calls can be answered: it was not closed, nor has its server ended."""
        return self._finalizer.alive and (self._running.process != os.getpid() or self._running.server.alive)

    def close(self) -> None:
        """Kill all workers; calls that are under way raise UserError."""
        self._finalizer()

    def _start(self) -> None:
        self._running = _Running(self.entries, self._limits, self._give_up)
        self._finalizer = weakref.finalize(self, self._running.close)


class _Running:
    """A server, and the threads that each have one worker of it. failing: by name, the members of the last calls, in a
    row, that brought no answer at all."""

    def __init__(self, entries: Sequence[str], limits: Limits, give_up: bool) -> None:
        self.process, self.limits, self.give_up = os.getpid(), limits, give_up
        self.server = ForkServer(entries)
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.failing: defaultdict[str, list[int]] = defaultdict(list)
        self._threads = limits.workers or own_cores()
        for number in range(self._threads):
            # Daemons: a call that hangs must not hold up the end of the program.
            threading.Thread(target=_Caller(self).serve, name=f"gvpo-rewards-{number}", daemon=True).start()

    def close(self) -> None:
        if self.process == os.getpid():
            for _ in range(self._threads):
                self.jobs.put(None)
            self.server.close()


class _Caller:
    """A thread's work: jobs to a worker of its own, which it replaces when it has to."""

    def __init__(self, running: _Running) -> None:
        self._running = running
        self._worker: Worker | None = None

    def serve(self) -> None:
        while (job := self._running.jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                output = self._output(job)
            except BaseException as error:
                job.future.set_exception(error)
            else:
                job.future.set_result(output)
        if self._worker is not None:
            self._worker.close()

    def _output(self, job: _Job) -> Output:
        """All members in one call; each alone, where that call fails."""
        if job.count > 1:
            try:
                output = self._call(job)
            except Failed:
                pass
            else:
                self._running.failing[job.name] = []
                return output
        alone = [self._alone(job.of_member(member)) for member in range(job.count)]
        if self._running.give_up:
            self._count(job, [failure for output in alone for failure in output.failures.values()])
        return joined(alone)

    def _count(self, job: _Job, failures: Sequence[Failure]) -> None:
        """Give up where nothing gets an answer any more. Raises UserError."""
        failing = self._running.failing
        failing[job.name] = failing[job.name] + [job.count] if len(failures) == job.count else []
        count = sum(failing[job.name])
        if len(failing[job.name]) < FEWEST_CALLS or count < GIVE_UP:
            return
        failing[job.name] = []
        raise UserError(
            f"reward function {job.name!r} gave no answer for {count} completions in a row, for the last: "
            f"{failures[-1]}; fix the function, or raise the limit (reward_timeout, reward_memory)"
        )

    def _alone(self, job: _Job) -> Output:
        used = self._worker is not None
        try:
            return self._call(job)
        except Failed as failed:
            if used:
                # What an earlier member has left behind must not cost this one its reward: again, in a new worker.
                return self._alone(job)
            assert failed.failure is not None
            return Output([None], failures={0: failed.failure})

    def _call(self, job: _Job) -> Output:
        """One call. Raises Failed, with the cause, where the worker had to go."""
        limits, server = self._running.limits, self._running.server
        self._worker = worker = self._worker or server.fork(limits)
        try:
            answer = worker.exchange(job.place, job.name, dict(job.arguments), job.count)
            if "failure" in answer:
                raise Failed(Failure(*answer["failure"]))
        except Failed as failed:
            self._worker = None
            ending = server.end(worker, dying=failed.failure is None)
            raise Failed(failed.failure or ending) from None
        if worker.heaped > limits.memory / 2:
            # What it has heaped up since its first answer must not be held against the next member.
            self._worker = None
            server.end(worker)
        if "error" in answer:
            raise UserError(answer["error"])
        failures = {int(member): Failure(*cause) for member, cause in answer["output"].pop("failures").items()}
        return Output(**answer["output"], failures=failures)


def own_cores() -> int:
    """Cores that this process may use, divided by the processes of its run on this machine; at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
