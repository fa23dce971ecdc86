"""Groups to rewards: what the reward functions say, written into the members."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from gvpo.groups import Completion, Group
from gvpo.rewards.calling import Scoring
from gvpo.rewards.outputs import CAUSES
from gvpo.rewards.resolve import RewardFunction

FAILURES = "reward_failures"
"""Where a completion's meta says which functions gave it no answer, and why."""


def function_rewards(completion: Completion) -> dict[str, float]:
    """What each reward function gave a completion, by name; empty where none was asked."""
    kept = completion.meta.get("rewards")
    # A user's own meta may hold anything under that name.
    return {str(name): value for name, value in kept.items() if _is_number(value)} if isinstance(kept, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def fill_rewards(
    groups: Sequence[Group],
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    *,
    columns: Collection[str] = (),
    trainer_state: Any = None,
) -> dict[str, float]:
    """Set the rewards of every completion in place, except in groups that bring their own (one is enough).

    None from every function leaves the reward None: the member leaves its group. Each function's number is kept in
    the completion's meta under "rewards", what functions gave to log_extra under "extra", and why a function's call
    brought no answer under "reward_failures". columns, trainer_state: as in `score_groups`.
    Returns what the functions gave to log_metric. Raises UserError as `score_groups` does.
    """
    return fill_from(Scoring(functions, weights, columns=columns, trainer_state=trainer_state), groups)


def fill_from(scoring: Scoring, groups: Sequence[Group]) -> dict[str, float]:
    """As `fill_rewards`, with a scoring that may have been started on some of the groups."""
    asked = [group for group in groups if all(reward is None for reward in group.rewards)]
    report = scoring.report(asked)
    first = 0
    for number, group in enumerate(asked):
        for place, completion in enumerate(group.completions):
            completion.reward = report.rewards[number][place]
            by_function = {name: values[number][place] for name, values in report.per_function.items()}
            completion.meta["rewards"] = {name: value for name, value in by_function.items() if value is not None}
            if report.extra:
                completion.meta["extra"] = {name: values[first + place] for name, values in report.extra.items()}
            failed = {name: str(why[first + place]) for name, why in report.failures.items() if first + place in why}
            completion.meta.pop(FAILURES, None)
            if failed:
                completion.meta[FAILURES] = failed
        first += group.k
    return report.metrics


def failures_by_cause(groups: Iterable[Group]) -> Counter[str]:
    """How many completions a reward function failed on, by cause (`gvpo.rewards.outputs.CAUSES`)."""
    kept = [one.meta.get(FAILURES) for group in groups for one in group.completions]
    # A user's own meta may hold anything under that name.
    causes = [str(text).partition(":")[0] for one in kept if isinstance(one, dict) for text in one.values()]
    return Counter(cause for cause in causes if cause in CAUSES)
