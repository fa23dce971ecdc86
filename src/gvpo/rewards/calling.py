"""Calling reward functions as TRL calls them, and checking what they give back.

The convention is that of `GRPOTrainer._calculate_rewards` in TRL: everything by keyword, one value per member.
Functions of a pool get a group in each call, as soon as there is one; others all members of all groups in one call.
Where TRL would go on (NaN read as "no opinion", a log column of the wrong length) or stop with a traceback, one line
says which function, which value and how to fix it.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from gvpo.errors import UserError, nearest, shortened
from gvpo.rewards.outputs import Failure, Log, Output, blaming, joined, read_output
from gvpo.rewards.resolve import RewardFunction
from gvpo.rewards.workers.pool import PooledFunction

if TYPE_CHECKING:
    from gvpo.groups import Completion, Group

T = TypeVar("T")

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# TRL leaves these columns out: functions have them as `prompts`, `completions` and `completion_ids`.
LEFT_OUT = {"prompt", "completion", "completion_ids"}
RESERVED = set(ARGUMENTS) - LEFT_OUT


@dataclass
class RewardReport:
    """What the reward functions said about the members of some groups; lists run as the groups and members do.

    rewards: for each group and member the weighted sum over the functions that gave a number; None when none did.
    per_function: for each function's name, the unweighted numbers for each group and member.
    metrics: what functions gave to `log_metric`, averaged over the calls with the same name.
    extra: what functions gave to `log_extra`: a column's name, and one value per member, groups laid end to end. A
        column that several functions log is called `function/column`.
    failures: for each function's name, by member, groups laid end to end, why a call brought no value.
    """

    rewards: list[list[float | None]]
    per_function: dict[str, list[list[float | None]]]
    metrics: dict[str, float]
    extra: dict[str, list[Any]]
    failures: dict[str, dict[int, Failure]] = field(default_factory=dict)


def score_groups(
    groups: Sequence[Group],
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    *,
    columns: Collection[str] = (),
    trainer_state: Any = None,
) -> RewardReport:
    """Call the functions for all members of all groups; the groups are only read, rewards they have included.

    A function gets, by keyword, one value per member in each of: `prompts` (string or messages; None if a group has
    no prompt text), `completions` (string, or `[{"role": "assistant", "content": text}]` where the prompt is messages;
    None if a member has no text), `completion_ids` (None if a member has no ids), every column but `prompt`,
    `completion` and `completion_ids` (None where a group lacks it); and `trainer_state`, `log_extra`, `log_metric`.
    Lists and dicts are copies. Functions of a pool run in its processes, a group in each call. Of the others, which get
    all members in one call, synchronous ones run in order and in this thread; asynchronous ones then run together in an
    event loop in a thread of its own.

    groups: any number, of any sizes. Without members no function is called.
    functions: names must be unique, as `resolve_rewards` makes them.
    weights: a finite number for each function; None means 1 for each.
    columns: names that the dataset has beside those of these groups; functions get them too, None for each member.
    trainer_state: handed on as it is.
    Returns the rewards; bools count as 0 and 1, and None from a function means that it has no opinion.
    Raises UserError for weights that do not fit, a column with the name of another argument, and a function that
    raises, cannot take the arguments, or returns anything but one finite number or None per member.
    """
    return Scoring(functions, weights, columns=columns, trainer_state=trainer_state).report(groups)


class Scoring:
    """Groups on their way to rewards: functions of a pool work on what `start` was given while the caller goes on.

    Arguments and errors are those of `score_groups`.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None,
        *,
        columns: Collection[str] = (),
        trainer_state: Any = None,
    ) -> None:
        self._functions = functions
        self._names = names = [function.name for function in functions]
        assert len(set(names)) == len(names), "names of reward functions must be unique"
        self._factors = _checked_weights(weights, names)
        self._columns, self._trainer_state = columns, trainer_state
        self._started: dict[tuple[int, ...], dict[str, Future[Output]]] = {}

    def start(self, group: Group, columns: Collection[str] | None = None) -> None:
        """Have the functions of a pool called for a group; without them, nothing. columns: of all groups."""
        members = [_Member(0, m, group, one) for m, one in enumerate(group.completions)]
        names = [*group.columns, *self._columns] if columns is None else columns
        if not members:
            return
        self._started[_members_key(group)] = {
            one.name: one.function.submit(one.name, self._arguments(members, dict.fromkeys(names)), len(members))
            for one in self._functions
            if isinstance(one.function, PooledFunction)
        }

    def report(self, groups: Sequence[Group]) -> RewardReport:
        """The rewards of these groups, of which any may have been started. Waits for them."""
        members = [
            _Member(g, m, group, one) for g, group in enumerate(groups) for m, one in enumerate(group.completions)
        ]
        columns = list(dict.fromkeys([*(name for group in groups for name in group.columns), *self._columns]))
        check_signatures(self._functions, columns)
        try:
            for group in groups:
                if _members_key(group) not in self._started:
                    self.start(group, columns)
            outputs = self._outputs(groups, members, columns)
        except BaseException:
            self.cancel()
            raise
        values_FN = [_numbers(name, output, members) for name, output in zip(self._names, outputs, strict=True)]
        rewards_N = [
            _weighted_sum(member, [values[n] for values in values_FN], self._factors)
            for n, member in enumerate(members)
        ]
        per_function = zip(self._names, values_FN, strict=True)
        return RewardReport(
            rewards=_by_group(rewards_N, groups),
            per_function={name: _by_group(values, groups) for name, values in per_function},
            metrics=_averaged_metrics(outputs),
            extra=_merged_extra(self._names, outputs),
            failures={name: output.failures for name, output in zip(self._names, outputs, strict=True)},
        )

    def cancel(self) -> None:
        """Take back the calls that have not begun."""
        for future in [future for started in self._started.values() for future in started.values()]:
            future.cancel()

    def _outputs(self, groups: Sequence[Group], members: Sequence[_Member], columns: Collection[str]) -> list[Output]:
        """What each function gave to all members; those of a pool are waited for last."""
        here = [one for one in self._functions if not isinstance(one.function, PooledFunction)]
        called = _call_all(here, len(members), lambda: self._arguments(members, columns)) if members else []
        by_name = dict(zip([one.name for one in here], called, strict=False))
        started = [self._started[_members_key(group)] for group in groups if group.completions]
        for one in self._functions:
            if one not in here:
                by_name[one.name] = joined([futures[one.name].result() for futures in started])
        return [by_name.get(name, Output([])) for name in self._names]

    def _arguments(self, members: Sequence[_Member], columns: Iterable[str]) -> dict[str, Any]:
        """What every function gets, but what it logs with; copies, of which each call needs its own."""
        ids_N = [member.completion.token_ids for member in members]
        return {
            "prompts": _all_or_none([_copied(member.group.prompt) for member in members]),
            "completions": _all_or_none([_as_completion(member) for member in members]),
            "completion_ids": _all_or_none([ids if ids is None else list(ids) for ids in ids_N]),
            "trainer_state": self._trainer_state,
        } | {
            name: [_copied(member.group.columns.get(name)) for member in members]
            for name in columns
            if name not in LEFT_OUT
        }


@dataclass(frozen=True)
class _Member:
    group_index: int
    index: int
    group: Group
    completion: Completion

    def __str__(self) -> str:
        return f"group {self.group_index}, member {self.index} (counted from 0)"


def _members_key(group: Group) -> tuple[int, ...]:
    """A group by its members, which may be wrapped in another by the time that all are there."""
    return tuple(id(member) for member in group.completions)


# Arguments


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"reward_weights has {len(weights)} numbers for {len(names)} reward functions ({', '.join(names)}): "
            "give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise UserError(f"reward_weights: the weight of {name!r} is {weight}: give a finite number")
    return list(weights)


def check_signatures(functions: Sequence[RewardFunction], columns: Collection[str]) -> None:
    """Refuse functions that cannot be called with these columns of the dataset, and columns that no function can get.

    Raises UserError.
    """
    for name in columns:
        if functions and name in RESERVED:
            raise UserError(
                f"the dataset's column {name!r} has the name of an argument of every reward function: rename it"
            )
    arguments = [*ARGUMENTS, *(name for name in columns if name not in LEFT_OUT)]
    for function in functions:
        _check_signature(function, arguments)


def _as_completion(member: _Member) -> str | list[dict[str, Any]] | None:
    text = member.completion.text
    if text is None or not isinstance(member.group.prompt, list):
        return text
    return [{"role": "assistant", "content": text}]


def _all_or_none(values: list[Any]) -> list[Any] | None:
    return None if any(value is None for value in values) else values


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value) if hasattr(value, "tolist") else value  # arrays and tensors can be written into


# Calls


def _call_all(functions: Sequence[RewardFunction], count: int, arguments: Callable[[], dict[str, Any]]) -> list[Output]:
    """What functions of this process give `count` members. arguments: makes a set for each."""
    logs = [Log(function.name) for function in functions]
    returned: list[Any] = []
    try:
        for function, log in zip(functions, logs, strict=True):
            with blaming(function.name):
                # From an asynchronous function that is a coroutine, of which nothing has run yet.
                returned.append(function.function(**arguments(), log_extra=log.log_extra, log_metric=log.log_metric))
    except BaseException:
        for value in returned:
            if inspect.iscoroutine(value):
                value.close()  # it never started, and Python would warn of that
        raise
    awaited = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
    if awaited:
        results = _in_own_loop(_gathered([(functions[i].name, returned[i]) for i in awaited]))
        for i, result in zip(awaited, results, strict=True):
            returned[i] = result
    return [read_output(log.function_name, value, log, count) for log, value in zip(logs, returned, strict=True)]


def _check_signature(function: RewardFunction, arguments: Collection[str]) -> None:
    try:
        # A wrapper takes what it takes, whatever the function inside it says.
        parameters = inspect.signature(function.function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature: calling them is the check
        return
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, parameter in by_name.items():
        if name not in arguments and parameter.default is parameter.empty:
            raise UserError(
                f"reward function {function.name!r} needs {name!r}, which is neither a column of the dataset nor an "
                f"argument of every function; {nearest(name, arguments)}"
            )
    refused = [name for name in arguments if name not in by_name]
    if refused and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise UserError(
            f"reward function {function.name!r} does not take {', '.join(map(repr, refused))}: add **kwargs to its "
            "parameters, every function gets all arguments by name"
        )


async def _gathered(calls: Sequence[tuple[str, Awaitable[Any]]]) -> list[Any]:
    async def awaited(name: str, call: Awaitable[Any]) -> Any:
        with blaming(name):
            return await call

    return await asyncio.gather(*(awaited(name, call) for name, call in calls))


def _in_own_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in a new thread: in a notebook this thread has a running loop, and loops do not nest."""
    result: Future[T] = Future()

    def target() -> None:
        try:
            result.set_result(asyncio.run(main))
        except BaseException as error:
            result.set_exception(error)

    # A daemon, so that an interrupt (Ctrl-C) while waiting for the result does not leave a process that cannot end.
    threading.Thread(target=target, name="gvpo-rewards", daemon=True).start()
    return result.result()


# Results


def _numbers(name: str, output: Output, members: Sequence[_Member]) -> list[float | None]:
    return [
        None if value is None else _finite(name, value, member, n)
        for n, (value, member) in enumerate(zip(output.values, members, strict=True))
    ]


def _finite(name: str, value: float | str, member: _Member, index: int) -> float:
    if isinstance(value, str):
        raise UserError(
            f"reward function {name!r} returned {value} as value {index}, {member}: return a number, or None "
            "for no opinion"
        )
    if not math.isfinite(value):
        prompt, completion = member.group.prompt, member.completion
        raise UserError(
            f"reward function {name!r} returned {value} as value {index}, {member}, "
            f"prompt {_excerpt(prompt, member.group.prompt_ids)}, "
            f"completion {_excerpt(completion.text, completion.token_ids)}: return a finite number, or None for no "
            "opinion"
        )
    return value


def _weighted_sum(member: _Member, values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    total = sum(terms)
    if not math.isfinite(total):
        raise UserError(f"the weighted rewards of {member} sum to {total}: lower reward_weights or the rewards")
    return float(total) if terms else None


def _by_group(values_N: list[T], groups: Sequence[Group]) -> list[list[T]]:
    remaining = iter(values_N)
    return [list(islice(remaining, len(group.completions))) for group in groups]


def _averaged_metrics(outputs: Iterable[Output]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for output in outputs:
        for name, numbers in output.metrics.items():
            values[name] += numbers
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _merged_extra(names: Sequence[str], outputs: Sequence[Output]) -> dict[str, list[Any]]:
    loggers = Counter(column for output in outputs for column in output.extra)
    return {
        column if loggers[column] == 1 else f"{name}/{column}": values
        for name, output in zip(names, outputs, strict=True)
        for column, values in output.extra.items()
    }


def _excerpt(text: str | list[dict[str, Any]] | None, token_ids: list[int] | None) -> str:
    if text is None:
        return f"ids {shortened(str(token_ids))}"
    if isinstance(text, list):  # of a dialogue, the last message is what tells rows apart
        text = str(text[-1].get("content")) if text else ""
    return f"'{shortened(text)}'"
