"""What an update is described by: pure functions from its members to one flat row of numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor

from gvpo.groups import Group
from gvpo.objective import fit_metrics
from gvpo.rewards.fill import function_rewards
from gvpo.training.targets import member_weights


@dataclass(frozen=True, slots=True)
class Member:
    """One completion as the metrics see it. group: its number in the run; logps in nats; tokens: of the completion;
    staleness: updates since a policy drew it, None where that is not known."""

    group: int
    reward: float
    logp: float
    ref_logp: float
    tokens: int
    truncated: bool
    source: str
    by_function: dict[str, float]
    staleness: int | None = None


def members_of(
    groups: Sequence[Group],
    numbers: Sequence[int],
    logps: Sequence[float],
    refs: Sequence[float],
    *,
    update: int,
) -> list[Member]:
    """The members of these groups; numbers: one per group; logps, refs: one per member, end to end.

    update: how many are done; a member's meta says how many were when a policy drew it.
    """
    members, place = [], 0
    for group, number in zip(groups, numbers, strict=True):
        for one in group.completions:
            assert one.reward is not None and one.token_ids is not None
            tokens, rewards = len(one.token_ids), function_rewards(one)
            drawn = one.meta.get("update")
            age = update - drawn if isinstance(drawn, int) else None
            members.append(
                Member(number, one.reward, logps[place], refs[place], tokens, one.truncated, one.source, rewards, age)
            )
            place += 1
    return members


def update_metrics(members: Sequence[Member], beta: float, dropped: int = 0) -> dict[str, float]:
    """One update's row: rewards, the objective's terms, log-ratios, completions.

    members: those that are trained on, in groups of two and more; dropped: how many others there were.
    Means over members are plain; a quantity that no member has is left out. The regression's are `fit_metrics`.
    """
    row: dict[str, float] = {"members/dropped": float(dropped)}
    if not members:
        return row
    groups = by_group(members)
    row |= _reward_metrics(members, groups) | fit_metrics(*_tensors(members), beta=beta)
    lengths = [member.tokens for member in members]
    row["completions/mean_length"] = fmean(lengths)
    row["completions/max_length"] = max(lengths)
    row["completions/truncated"] = fmean(member.truncated for member in members)
    if ages := [member.staleness for member in members if member.staleness is not None]:
        row["staleness/mean"], row["staleness/max"] = fmean(ages), max(ages)
    return row | _source_metrics(members, beta)


def by_group(members: Iterable[Member]) -> list[list[Member]]:
    """The members of each group, in order of first appearance."""
    groups: dict[int, list[Member]] = defaultdict(list)
    for member in members:
        groups[member.group].append(member)
    return list(groups.values())


def _source_metrics(members: Sequence[Member], beta: float) -> dict[str, float]:
    """Each source's share of the members and, beside others, its mean reward and log-ratio, and its share of the
    weights' absolute values: how much of the gradient is its."""
    sources = sorted({member.source for member in members})
    row = {f"source/{name}": fmean(member.source == name for member in members) for name in sources}
    if len(sources) == 1:
        return row
    masses = member_weights(*_tensors(members), beta).abs().tolist()
    total = sum(masses)
    for name in sources:
        own = [member for member in members if member.source == name]
        row[f"source/{name}/reward"] = fmean(member.reward for member in own)
        row[f"source/{name}/log_ratio"] = fmean(member.logp - member.ref_logp for member in own)
        mass = sum(one for one, member in zip(masses, members, strict=True) if member.source == name)
        row[f"source/{name}/weight"] = mass / total if total > 0 else 0.0
    return row


def _tensors(members: Sequence[Member]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logps, refs, rewards = (
        torch.tensor([getattr(member, name) for member in members], dtype=torch.float64)
        for name in ("logp", "ref_logp", "reward")
    )
    return logps, refs, rewards, torch.tensor([member.group for member in members])


def _reward_metrics(members: Sequence[Member], groups: Sequence[Sequence[Member]]) -> dict[str, float]:
    rewards = [[member.reward for member in group] for group in groups]
    row = {
        "reward": fmean(value for group in rewards for value in group),
        "reward_min": min(value for group in rewards for value in group),
        "reward_max": max(value for group in rewards for value in group),
        "reward_std": fmean(pstdev(group) for group in rewards),
        "frac_reward_zero_std": fmean(max(group) == min(group) for group in rewards),
        "groups": float(len(rewards)),
    }
    for name in sorted({name for member in members for name in member.by_function}):
        values = [member.by_function[name] for member in members if name in member.by_function]
        row[f"rewards/{name}/mean"] = fmean(values)
    return row
