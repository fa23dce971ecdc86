"""Rewards into groups: the members' own where they have them, else what the functions say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo.groups import Group
from gvpo.rewards.calling import score_groups
from gvpo.rewards.resolve import RewardFunction


def fill_rewards(
    groups: Sequence[Group],
    own: Sequence[bool],
    functions: Sequence[RewardFunction],
    weights: Sequence[float] | None,
    *,
    trainer_state: Any = None,
) -> dict[str, float]:
    """Set every completion's reward, in place; groups whose `own` is True keep theirs.

    Each function's number is kept in the completion's meta, under "rewards". None from every function leaves the
    reward None: the member is out of its group. Returns what the functions logged as metrics.
    Raises UserError as `score_groups` does.
    """
    asked = [group for group, has_own in zip(groups, own, strict=True) if not has_own]
    report = score_groups(
        asked, list(functions), None if weights is None else list(weights), trainer_state=trainer_state
    )
    for number, group in enumerate(asked):
        for place, completion in enumerate(group.completions):
            completion.reward = report.rewards[number][place]
            by_function = {name: values[number][place] for name, values in report.per_function.items()}
            completion.meta["rewards"] = {name: value for name, value in by_function.items() if value is not None}
    return report.metrics
