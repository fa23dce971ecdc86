"""Calling reward functions exactly as TRL calls them, and checking what they give back.

The convention is that of `GRPOTrainer._calculate_rewards` in TRL: one call per function for all members of all groups,
everything by keyword. Where TRL would go on (NaN read as "no opinion", a log column of the wrong length) or stop with
a traceback, one line says which function, which value and how to fix it.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Collection, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

from gvpo.errors import UserError, nearest
from gvpo.rewards.resolve import RewardFunction, error_line, shortened

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
    """

    rewards: list[list[float | None]]
    per_function: dict[str, list[list[float | None]]]
    metrics: dict[str, float]
    extra: dict[str, list[Any]]


def score_groups(
    groups: Sequence[Group],
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    *,
    columns: Collection[str] = (),
    trainer_state: Any = None,
) -> RewardReport:
    """Call every function once for all members of all groups; the groups are only read, rewards they have included.

    A function gets, by keyword, one value per member in each of: `prompts` (string or messages; None if a group has
    no prompt text), `completions` (string, or `[{"role": "assistant", "content": text}]` where the prompt is messages;
    None if a member has no text), `completion_ids` (None if a member has no ids), every column but `prompt`,
    `completion` and `completion_ids` (None where a group lacks it); and `trainer_state`, `log_extra`, `log_metric`.
    Lists and dicts are copies. Synchronous functions run first, in order and in this thread; asynchronous ones then
    run together in an event loop in a thread of its own.

    groups: any number, of any sizes. Without members no function is called.
    functions: names must be unique, as `resolve_rewards` makes them.
    weights: a finite number for each function; None means 1 for each.
    columns: names that the dataset has beside those of these groups; functions get them too, None for each member.
    trainer_state: handed on as it is.
    Returns the rewards; bools count as 0 and 1, and None from a function means that it has no opinion.
    Raises UserError for weights that do not fit, a column with the name of another argument, and a function that
    raises, cannot take the arguments, or returns anything but one finite number or None per member.
    """
    names = [function.name for function in functions]
    assert len(set(names)) == len(names), "names of reward functions must be unique"
    factors = _checked_weights(weights, names)
    members = [_Member(g, m, group, one) for g, group in enumerate(groups) for m, one in enumerate(group.completions)]
    logs = {name: _Log(name) for name in names}
    names_given = list(dict.fromkeys([*(name for group in groups for name in group.columns), *columns]))
    check_signatures(functions, names_given)
    outputs: list[Any] = [[] for _ in functions]
    if members:
        outputs = _call_all(functions, members, names_given, logs, trainer_state)
    values_FN = [_numbers(name, output, members) for name, output in zip(names, outputs, strict=True)]
    rewards_N = [
        _weighted_sum(member, [values[n] for values in values_FN], factors) for n, member in enumerate(members)
    ]
    return RewardReport(
        rewards=_by_group(rewards_N, groups),
        per_function={name: _by_group(values, groups) for name, values in zip(names, values_FN, strict=True)},
        metrics=_averaged_metrics(logs.values()),
        extra=_merged_extra(logs, len(members)),
    )


@dataclass(frozen=True)
class _Member:
    group_index: int
    index: int
    group: Group
    completion: Completion

    def __str__(self) -> str:
        return f"group {self.group_index}, member {self.index} (counted from 0)"


class _Log:
    """What one function logs during its call; the methods' parameters are named as in TRL."""

    def __init__(self, function_name: str) -> None:
        self.function_name = function_name
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def log_extra(self, column: str, values: list[Any]) -> None:
        # Arrays and tensors, as lists and numbers: a completions file is JSON.
        self.extra[column].extend(value.tolist() if hasattr(value, "tolist") else value for value in values)

    def log_metric(self, name: str, value: float) -> None:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise UserError(
                f"reward function {self.function_name!r} called log_metric({name!r}, ...) with {_shown(value)}: "
                "give a finite number"
            )
        self.metrics[name].append(number)


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


def _arguments(members: Sequence[_Member], columns: Collection[str]) -> dict[str, Any]:
    ids_N = [member.completion.token_ids for member in members]
    return {
        "prompts": _all_or_none([_copied(member.group.prompt) for member in members]),
        "completions": _all_or_none([_as_completion(member) for member in members]),
        "completion_ids": _all_or_none([ids if ids is None else list(ids) for ids in ids_N]),
    } | {
        name: [_copied(member.group.columns.get(name)) for member in members]
        for name in columns
        if name not in LEFT_OUT
    }


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


def _call_all(
    functions: Sequence[RewardFunction],
    members: Sequence[_Member],
    columns: Collection[str],
    logs: dict[str, _Log],
    trainer_state: Any,
) -> list[Any]:
    outputs: list[Any] = []
    try:
        for function in functions:
            outputs.append(_call(function, members, columns, logs[function.name], trainer_state))
    except BaseException:
        for output in outputs:
            if inspect.iscoroutine(output):
                output.close()  # it never started, and Python would warn of that
        raise
    awaited = [i for i, output in enumerate(outputs) if inspect.isawaitable(output)]
    if awaited:
        results = _in_own_loop(_gathered([(functions[i].name, outputs[i]) for i in awaited]))
        for i, result in zip(awaited, results, strict=True):
            outputs[i] = result
    return outputs


def _call(
    function: RewardFunction, members: Sequence[_Member], columns: Collection[str], log: _Log, trainer_state: Any
) -> Any:
    """What the function returns; from an asynchronous one that is a coroutine, of which nothing has run yet."""
    arguments = _arguments(members, columns)
    arguments |= {"trainer_state": trainer_state, "log_extra": log.log_extra, "log_metric": log.log_metric}
    with _blaming(function.name):
        return function.function(**arguments)


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


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:  # the function says itself what its user has to fix
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward function {name!r} raised {error_line(error)}: fix it, or return None there") from error


async def _gathered(calls: Sequence[tuple[str, Awaitable[Any]]]) -> list[Any]:
    async def awaited(name: str, call: Awaitable[Any]) -> Any:
        with _blaming(name):
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


def _numbers(name: str, output: Any, members: Sequence[_Member]) -> list[float | None]:
    values = _as_list(output)
    if values is None:
        raise UserError(
            f"reward function {name!r} returned {_shown(output)}: return a list with one number (or None) for each "
            "completion"
        )
    if len(values) != len(members):
        raise UserError(
            f"reward function {name!r} returned {len(values)} values, expected {len(members)}: "
            "return one number (or None) for each completion"
        )
    return [None if value is None else _finite(name, value, members[n], n) for n, value in enumerate(values)]


def _as_list(output: Any) -> list[Any] | None:
    if isinstance(output, list | tuple):
        return list(output)
    # Tensors and arrays, without importing their libraries.
    return output.tolist() if getattr(output, "ndim", None) == 1 and hasattr(output, "tolist") else None


def _finite(name: str, value: Any, member: _Member, index: int) -> float:
    number = _number(value)
    if number is None:
        raise UserError(
            f"reward function {name!r} returned {_shown(value)} as value {index}, {member}: return a number, or None "
            "for no opinion"
        )
    if not math.isfinite(number):
        prompt, completion = member.group.prompt, member.completion
        raise UserError(
            f"reward function {name!r} returned {number} as value {index}, {member}, "
            f"prompt {_excerpt(prompt, member.group.prompt_ids)}, "
            f"completion {_excerpt(completion.text, completion.token_ids)}: return a finite number, or None for no "
            "opinion"
        )
    return number


def _number(value: Any) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of torch and NumPy
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number or fraction beyond float's range
        return math.inf


def _weighted_sum(member: _Member, values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    total = sum(terms)
    if not math.isfinite(total):
        raise UserError(f"the weighted rewards of {member} sum to {total}: lower reward_weights or the rewards")
    return float(total) if terms else None


def _by_group(values_N: list[T], groups: Sequence[Group]) -> list[list[T]]:
    remaining = iter(values_N)
    return [list(islice(remaining, len(group.completions))) for group in groups]


def _averaged_metrics(logs: Iterable[_Log]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for log in logs:
        for name, numbers in log.metrics.items():
            values[name] += numbers
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _merged_extra(logs: dict[str, _Log], count: int) -> dict[str, list[Any]]:
    loggers = Counter(column for log in logs.values() for column in log.extra)
    merged: dict[str, list[Any]] = {}
    for name, log in logs.items():
        for column, values in log.extra.items():
            if len(values) != count:
                raise UserError(
                    f"reward function {name!r} logged {len(values)} values to the column {column!r}, expected {count}: "
                    "give log_extra one for each completion"
                )
            merged[column if loggers[column] == 1 else f"{name}/{column}"] = values
    return merged


def _shown(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{shortened(repr(value))} ({type(value).__name__}{shape})"


def _excerpt(text: str | list[dict[str, Any]] | None, token_ids: list[int] | None) -> str:
    if text is None:
        return f"ids {shortened(str(token_ids))}"
    if isinstance(text, list):  # of a dialogue, the last message is what tells rows apart
        text = str(text[-1].get("content")) if text else ""
    return f"'{shortened(text)}'"
