"""Every objective as its paper writes it, one group at a time, token by token; and batches that are hard."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gvpo.objective import OBJECTIVES

EPSILON, LONGEST = 0.2, 6.0
SETTINGS: dict[str, Any] = {"epsilon": EPSILON, "max_completion_length": LONGEST}
TOKENS = [name for name, one in OBJECTIVES.items() if one.per_token]
SEQUENCES = [name for name in OBJECTIVES if name not in TOKENS]
PAIRED = ["dpo", "ipo"]
SEEDS = range(30)
every = pytest.mark.parametrize("name", OBJECTIVES)
on_tokens = pytest.mark.parametrize("name", TOKENS)


@dataclass(frozen=True)
class Batch:
    """Arguments of any objective, in float64: those on sequences take the sums of the tokens that are scored."""

    logps: Tensor
    old: Tensor
    refs: Tensor
    mask: Tensor
    rewards: Tensor
    ids: Tensor
    beta: float

    def take(self, which: Tensor) -> Batch:
        columns = {name: getattr(self, name)[which] for name in ("logps", "old", "refs", "mask", "rewards", "ids")}
        return replace(self, **columns)

    def summed(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0).sum(1)

    def loss(self, name: str, logps: Tensor | None = None, denominator: float | None = None) -> Tensor:
        objective, logps = OBJECTIVES[name], self.logps if logps is None else logps
        options = {"beta": self.beta, "denominator": denominator}
        if objective.per_token:
            options |= {setting: SETTINGS[setting] for setting in objective.settings}
            return objective.loss(logps, self.old, self.refs, self.mask, self.rewards, self.ids, **options)
        return objective.loss(self.summed(logps), self.summed(self.refs), self.rewards, self.ids, **options)

    def gradient(self, name: str, denominator: float | None = None) -> Tensor:
        leaf = self.logps.clone().requires_grad_()
        return torch.autograd.grad(self.loss(name, leaf, denominator), leaf)[0]

    def groups(self) -> list[list[int]]:
        """Positions of each group of two or more, in plain Python: no code shared with the objectives."""
        ids = self.ids.tolist()
        groups = [[i for i, other in enumerate(ids) if other == label] for label in sorted(set(ids))]
        return [group for group in groups if len(group) >= 2]


def stale_batch(seed: int, sizes: list[int] | None = None, *, beta: float | None = None) -> Batch:
    """Interleaved, ragged groups under arbitrary ids; 0 to 5 tokens each, each up to 6 nats from old and reference."""
    draw = random.Random(seed)
    sizes = sizes or [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
    labels = draw.sample(range(-(10**18), 10**18), len(sizes))
    ids = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    draw.shuffle(ids)
    # Rewards of few values, so that there are ties, or of many.
    reward = draw.choice([lambda: draw.choice([0.0, 0.1, 1.0]), lambda: draw.uniform(-3, 3)])
    rewards = torch.tensor([reward() for _ in ids], dtype=torch.float64)
    width = 5
    mask = torch.zeros(len(ids), width, dtype=torch.bool)
    for row in mask:
        for place in range(draw.randint(0, width)):
            row[place] = draw.random() < 0.8  # a given token stands between scored ones

    def matrix(values: Callable[[], float]) -> Tensor:
        return torch.tensor([[values() for _ in range(width)] for _ in ids], dtype=torch.float64)

    logps = matrix(lambda: draw.uniform(-9, -0.1))
    old, refs = (logps + matrix(lambda: draw.uniform(-6, 6)) for _ in range(2))
    beta = draw.choice([0.02, 0.5, 2.0]) if beta is None else beta
    return Batch(logps, old, refs, mask, rewards, torch.tensor(ids), beta)


def close(actual: Tensor, expected: Tensor | float) -> bool:
    """Equal to 1e-9, each number by itself: one that a ratio has made huge does not hide the others."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return torch.allclose(actual, expected.expand_as(actual), rtol=1e-9, atol=1e-10)


# --- The papers' formulas, one group at a time, token by token -------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """l: the policy's log-probs of the scored tokens, with a graph; r, old: numbers; R: the reward."""

    l: list[Tensor]  # noqa: E741
    old: list[float]
    r: list[float]
    R: float

    @property
    def logp(self) -> Tensor:
        return torch.stack([torch.zeros((), dtype=torch.float64), *self.l]).sum()

    @property
    def log_ratio(self) -> Tensor:
        return self.logp - math.fsum(self.r)


def centred(values: list[float]) -> list[float]:
    return [value - math.fsum(values) / len(values) for value in values]


def clipped(ratio: Tensor, advantage: float) -> Tensor:
    """PPO's surrogate by cases: the good counts up to a ratio of 1 + epsilon, the bad down to one of 1 - epsilon."""
    if advantage >= 0:
        return advantage * (ratio if ratio < 1 + EPSILON else torch.full_like(ratio, 1 + EPSILON))
    return advantage * (ratio if ratio > 1 - EPSILON else torch.full_like(ratio, 1 - EPSILON))


def surrogate(members: list[Member], advantages: list[float], beta: float, lengths: list[float]) -> Tensor:
    """Minus the mean over members of the sum over tokens, over a length, of surrogate less beta x KL."""
    total = torch.zeros((), dtype=torch.float64)
    for member, advantage, length in zip(members, advantages, lengths, strict=True):
        for logp, old, ref in zip(member.l, member.old, member.r, strict=True):
            kl = torch.exp(ref - logp) - (ref - logp) - 1
            total = total - (clipped(torch.exp(logp - old), advantage) - beta * kl) / length
    return total / len(members)


def grpo(members: list[Member], beta: float) -> Tensor:
    spread = statistics.stdev([member.R for member in members]) + 1e-4
    advantages = [value / spread for value in centred([member.R for member in members])]
    return surrogate(members, advantages, beta, [float(max(len(member.l), 1)) for member in members])


def dr_grpo(members: list[Member], beta: float) -> Tensor:
    return surrogate(members, centred([member.R for member in members]), beta, [LONGEST] * len(members))


def rloo(members: list[Member], beta: float) -> Tensor:
    returns = [m.R - beta * (math.fsum(m.old) - math.fsum(m.r)) for m in members]
    total = torch.zeros((), dtype=torch.float64)
    for i, member in enumerate(members):
        others = returns[:i] + returns[i + 1 :]
        total = total - clipped(torch.exp(member.logp - math.fsum(member.old)), returns[i] - statistics.fmean(others))
    return total / len(members)


def reinforce(members: list[Member], beta: float) -> Tensor:
    advantages = centred([m.R - beta * float(m.log_ratio.detach()) for m in members])
    return -torch.stack([a * m.logp for a, m in zip(advantages, members, strict=True)]).mean()


def weighted(members: list[Member], beta: float, *, reference: bool, policy: bool) -> Tensor:
    """GVPO's weighted likelihood, with the reference's and the policy's term of the weight or without."""
    weights = [m.R + beta * (reference * math.fsum(m.r) - policy * float(m.logp.detach())) for m in members]
    terms = [w * m.logp for w, m in zip(centred(weights), members, strict=True)]
    return -beta / (len(members) - 1) * torch.stack(terms).sum()


def over_pairs(members: list[Member], term: Callable[[Member, Member], Tensor], *, ranked: bool) -> Tensor:
    """The mean over pairs; ranked: of different rewards, the better one first."""
    pairs = list(itertools.permutations(members, 2) if ranked else itertools.combinations(members, 2))
    terms = [term(one, other) for one, other in pairs if not ranked or one.R > other.R]
    return torch.stack(terms).mean() if terms else 0.0 * sum(m.logp for m in members)  # pyright: ignore


def gvpo(members: list[Member], beta: float) -> Tensor:
    def term(one: Member, other: Member) -> Tensor:
        return (beta * (one.log_ratio - other.log_ratio) - (one.R - other.R)) ** 2 / 4

    return over_pairs(members, term, ranked=False)


def dpo(members: list[Member], beta: float) -> Tensor:
    def term(winner: Member, loser: Member) -> Tensor:
        return torch.log1p(torch.exp(-beta * (winner.log_ratio - loser.log_ratio)))

    return over_pairs(members, term, ranked=True)


def ipo(members: list[Member], beta: float) -> Tensor:
    def term(winner: Member, loser: Member) -> Tensor:
        return (winner.log_ratio - loser.log_ratio - 1 / (2 * beta)) ** 2

    return over_pairs(members, term, ranked=True)


def rebel(members: list[Member], beta: float) -> Tensor:
    def term(one: Member, other: Member) -> Tensor:
        return (one.log_ratio - other.log_ratio - (one.R - other.R) / beta) ** 2

    return over_pairs(members, term, ranked=False)


def kimi_pmd(members: list[Member], beta: float) -> Tensor:
    # The paper's loss is sum (R - Rbar - tau x log-ratio)^2, over 2 tau so that the gradient is the paper's update.
    errors = [a - beta * m.log_ratio for a, m in zip(centred([m.R for m in members]), members, strict=True)]
    return torch.stack(errors).square().mean() / (2 * beta)


PLAIN: dict[str, Callable[[list[Member], float], Tensor]] = {
    "gvpo": gvpo,
    "gvpo_no_cov": lambda members, beta: weighted(members, beta, reference=False, policy=True),
    "gvpo_no_var": lambda members, beta: weighted(members, beta, reference=True, policy=False),
    "gvpo_no_cov_var": lambda members, beta: weighted(members, beta, reference=False, policy=False),
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dpo": dpo,
    "ipo": ipo,
    "rebel": rebel,
    "kimi_pmd": kimi_pmd,
}


def plain(name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over groups of two and more, and its gradient."""
    leaf = batch.logps.clone().requires_grad_()

    def member(i: int) -> Member:
        scored = [t for t, seen in enumerate(batch.mask[i].tolist()) if seen]
        old, refs = (values[i][scored].tolist() for values in (batch.old, batch.refs))
        return Member([leaf[i, t] for t in scored], old, refs, float(batch.rewards[i]))

    losses = [PLAIN[name]([member(i) for i in group], batch.beta) for group in batch.groups()]
    loss = torch.stack([0.0 * leaf.sum(), *losses]).sum() / max(len(losses), 1)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]
