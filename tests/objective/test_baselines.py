"""The objectives beside GVPO against plain loops over their papers' formulas, their identities, and their refusals."""

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

from gvpo.objective import OBJECTIVES, gvpo_components

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


def test_every_objective_has_a_formula_here() -> None:
    assert PLAIN.keys() == OBJECTIVES.keys()


@every
def test_value_and_gradient_are_the_papers(name: str) -> None:
    for seed in SEEDS:
        batch = stale_batch(seed)
        loss, gradient = plain(name, batch)
        assert close(batch.loss(name), loss), seed
        assert close(batch.gradient(name), gradient), seed


@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if one.takes_zero_beta])
def test_without_a_kl_term(name: str) -> None:
    for seed in SEEDS:
        batch = stale_batch(seed, beta=0.0)
        loss, gradient = plain(name, batch)
        assert close(batch.loss(name), loss) and close(batch.gradient(name), gradient), seed
        elsewhere = replace(batch, refs=batch.refs + torch.linspace(-9, 9, batch.refs.numel()).view_as(batch.refs))
        assert torch.equal(elsewhere.gradient(name), batch.gradient(name))


def test_the_batches_hold_what_is_hard() -> None:
    batches = [stale_batch(seed) for seed in SEEDS]
    gaps = torch.cat([(one.summed(one.logps) - one.summed(one.refs)).abs() for one in batches])
    assert gaps.median() > 2 and gaps.max() > 10
    counts = [torch.stack([one.ids == label for label in one.ids]).sum(0) for one in batches]
    assert any((k == 1).any() for k in counts) and any(len(set(k.tolist())) > 2 for k in counts)
    assert any((~one.mask).all(1).any() for one in batches)  # completions without tokens
    assert any(one.ids[0] == one.ids[2] != one.ids[1] for one in batches if len(one.ids) > 2)  # interleaved
    tied = [len(set(one.rewards[group].tolist())) < len(group) for one in batches for group in one.groups()]
    assert any(tied) and not all(tied)
    clipped_tokens = {
        (bool(ratio > 0), bool(one.rewards[i] > one.rewards[group].mean()))
        for one in batches
        for group in one.groups()
        for i in group
        for ratio in (one.logps - one.old)[i][one.mask[i]]
        if abs(ratio) > 0.3
    }
    assert len(clipped_tokens) == 4  # both ways, for the better and for the worse


# --- By hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "loss", "slopes"),
    [  # Rewards 1 and 0: advantages 1/2 and -1/2 in Dr. GRPO, 1 and -1 in RLOO.
        ((1.0, 1.0), 0.0, (-1.0, 1.0)),
        ((2.0, 1.0), -0.2, (0.0, 1.0)),  # the better one is likely enough: 1.2 - 1
        ((0.5, 1.0), 0.5, (-0.5, 1.0)),  # but has been lost: counts in full
        ((1.0, 0.5), -0.2, (-1.0, 0.0)),  # the worse one is unlikely enough: 1 - 0.8
        ((1.0, 2.0), 1.0, (-1.0, 2.0)),  # but has been found: counts in full
    ],
)
def test_what_is_clipped_by_hand(ratios: tuple[float, float], loss: float, slopes: tuple[float, float]) -> None:
    old = torch.tensor([[-3.0], [-1.0]], dtype=torch.float64)
    logps = old + torch.tensor(ratios, dtype=torch.float64).log()[:, None]
    ids, mask = torch.tensor([4, 4]), torch.ones(2, 1, dtype=torch.bool)
    batch = Batch(logps, old, old, mask, torch.tensor([1.0, 0.0]), ids, 0.0)
    assert close(batch.loss("rloo"), loss / 2)
    assert close(batch.gradient("rloo"), torch.tensor(slopes, dtype=torch.float64)[:, None] / 2)
    assert close(batch.loss("dr_grpo"), loss / 4 / LONGEST)
    assert close(batch.gradient("dr_grpo"), torch.tensor(slopes, dtype=torch.float64)[:, None] / 4 / LONGEST)


# --- Groups ----------------------------------------------------------------------------------------------------------


@every
def test_splits_in_whole_groups_add_up(name: str) -> None:
    batch = stale_batch(3, [3, 1, 2, 4, 1, 2])
    parts = batch.ids % 3  # of any size
    assert len(set(parts.tolist())) == 3
    total, loss, gradient = len(batch.groups()), torch.zeros(()), torch.zeros_like(batch.logps)
    for part in range(4):  # the last one is empty
        which = (parts == part).nonzero().squeeze(1)
        loss = loss + batch.take(which).loss(name, denominator=total)
        gradient[which] = batch.take(which).gradient(name, total)
    assert close(loss, batch.loss(name)) and close(gradient, batch.gradient(name))
    assert close(batch.loss(name, denominator=2.5), batch.loss(name) * total / 2.5)


@every
@pytest.mark.parametrize("value", [-50.0, -math.inf, math.nan])
def test_a_lone_member_contributes_nothing_whatever_it_holds(name: str, value: float) -> None:
    batch = stale_batch(5, [3, 1, 2])
    (lone,) = set(range(6)) - {i for group in batch.groups() for i in group}
    batch.mask[lone] = True
    rest = torch.tensor([i for i in range(6) if i != lone])
    columns = {column: getattr(batch, column).clone() for column in ("logps", "old", "refs", "rewards")}
    for tensor in columns.values():
        tensor[lone] = value
    odd = replace(batch, **columns)
    assert close(odd.loss(name), batch.take(rest).loss(name))
    assert not odd.gradient(name)[lone].any()
    assert close(odd.gradient(name)[rest], batch.take(rest).gradient(name))


@every
def test_a_broken_group_breaks_no_other(name: str) -> None:
    batch = stale_batch(6, [3, 2])
    small, large = sorted(batch.groups(), key=len)
    for column in ("logps", "refs", "rewards"):
        values = getattr(batch, column).clone()
        values[small] = math.nan
        gradient = replace(batch, **{column: values}).gradient(name)
        assert close(gradient[large], batch.gradient(name)[large])


@every
@pytest.mark.parametrize("denominator", [None, 0, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_group_to_teach_is_a_zero_with_a_graph(name: str, count: int, denominator: float | None) -> None:
    batch = stale_batch(0, [1, 1, 1]).take(torch.arange(count))
    leaf = batch.logps.clone().requires_grad_()
    loss = batch.loss(name, leaf, denominator)
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float64
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("name", [*PAIRED, "grpo", "dr_grpo", "rloo", "reinforce", "gvpo_no_cov_var"])
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e6])
def test_equal_rewards_teach_exactly_nothing(name: str, reward: float) -> None:
    beta = 0.0 if OBJECTIVES[name].takes_zero_beta else 0.3
    batch = stale_batch(8, [3, 5], beta=beta)
    batch = replace(batch, rewards=torch.full_like(batch.rewards, reward))
    assert batch.loss(name) == 0.0
    assert not batch.gradient(name).any()


@pytest.mark.parametrize("name", ["gvpo", "reinforce", "rloo", "grpo", "dr_grpo", "rebel", "kimi_pmd"])
def test_equal_rewards_still_pull_towards_the_reference(name: str) -> None:
    batch = stale_batch(8, [3, 5], beta=0.3)
    flat, other = (replace(batch, rewards=torch.full_like(batch.rewards, reward)) for reward in (0.0, 7.0))
    assert flat.gradient(name).abs().max() > 0.01
    assert close(flat.gradient(name), other.gradient(name))


@pytest.mark.parametrize("name", PAIRED)
def test_only_the_order_of_rewards_counts_for_preferences(name: str) -> None:
    batch = stale_batch(9, [4, 3])
    assert torch.equal(replace(batch, rewards=batch.rewards.exp()).gradient(name), batch.gradient(name))
    assert not torch.equal(replace(batch, rewards=-batch.rewards).gradient(name), batch.gradient(name))


# --- Numbers: masks, dtypes, graphs, extremes ------------------------------------------------------------------------


@on_tokens
def test_what_stands_where_nothing_is_scored_is_not_looked_at(name: str) -> None:
    batch = stale_batch(10, [3, 2, 1])
    for filling in (0.0, math.nan, math.inf, -math.inf):
        columns = {
            column: torch.where(batch.mask, getattr(batch, column), filling) for column in ("logps", "old", "refs")
        }
        filled = replace(batch, **columns)
        assert torch.equal(filled.loss(name), batch.loss(name))
        gradient = filled.gradient(name)
        assert torch.equal(gradient, batch.gradient(name)) and not gradient[~batch.mask].any()


@on_tokens
def test_wider_padding_changes_nothing(name: str) -> None:
    batch = stale_batch(11, [3, 2])
    columns = {column: torch.nn.functional.pad(getattr(batch, column), (0, 3)) for column in ("logps", "old", "refs")}
    wide = replace(batch, **columns, mask=torch.nn.functional.pad(batch.mask, (0, 3)))
    assert close(wide.loss(name), batch.loss(name)) and close(wide.gradient(name)[:, :-3], batch.gradient(name))


@on_tokens
def test_completions_without_tokens(name: str) -> None:
    batch = stale_batch(12, [3, 2])
    batch.mask[batch.groups()[0]] = False
    assert close(batch.loss(name), plain(name, batch)[0])
    for empty in (replace(batch, mask=torch.zeros_like(batch.mask)), stale_batch(12, [3, 2])):
        if empty.mask.any():  # no column at all
            columns = {column: getattr(empty, column)[:, :0] for column in ("logps", "old", "refs", "mask")}
            empty = replace(empty, **columns)
        assert math.isfinite(empty.loss(name)) and not empty.gradient(name).any()


@every
def test_only_the_policy_carries_a_gradient(name: str) -> None:
    batch = stale_batch(13, [3, 2])
    given = {column: getattr(batch, column).clone().requires_grad_() for column in ("logps", "old", "refs", "rewards")}
    replace(batch, **given).loss(name).backward()
    assert [column for column, values in given.items() if values.grad is not None] == ["logps"]


@every
def test_nothing_that_is_given_changes(name: str) -> None:
    batch = stale_batch(14)
    before = [getattr(batch, column).clone() for column in ("logps", "old", "refs", "mask", "rewards", "ids")]
    batch.gradient(name)
    after = [getattr(batch, column) for column in ("logps", "old", "refs", "mask", "rewards", "ids")]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@every
def test_float32_is_computed_in_float64(name: str) -> None:
    batch = stale_batch(15, [3, 2])
    single = replace(batch, logps=batch.logps.float(), old=batch.old.float(), refs=batch.refs.float())
    double = replace(single, logps=single.logps.double(), old=single.old.double(), refs=single.refs.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = single.loss(name)
    assert loss.dtype == torch.float64
    assert torch.allclose(loss, double.loss(name), rtol=1e-5)  # the sums over tokens are float32, here in the test
    assert single.gradient(name).dtype == torch.float32
    if name in TOKENS:
        assert torch.equal(loss, double.loss(name))


@on_tokens
@pytest.mark.parametrize("nats", [800.0, 1e5])
def test_a_ratio_beyond_floating_point(name: str, nats: float) -> None:
    # exp of it is infinite. Where it is clipped, or multiplied by nothing, it must be as if it were merely large.
    old = torch.full((4, 1), -nats - 1, dtype=torch.float64)
    logps = old.clone()
    logps[[0, 2, 3]] = -1.0
    mask, ids = torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    batch = Batch(logps, old, logps, mask, torch.tensor([1.0, 0.0, 5.0, 5.0]), ids, 0.0)
    large = replace(batch, old=torch.where(logps == old, old, -11.0))
    assert close(batch.loss(name), large.loss(name))
    assert close(batch.gradient(name), large.gradient(name)) and batch.gradient(name)[1] > 0
    lost = replace(batch, rewards=torch.tensor([0.0, 1.0, 5.0, 5.0]))  # nothing bounds this one: it must not look well
    assert not math.isfinite(lost.loss(name)) and not lost.gradient(name).isfinite().all()


def test_far_losers_of_preferences_do_not_overflow() -> None:
    logps = torch.tensor([[-1e5], [-1.0]], dtype=torch.float64)
    flat = torch.zeros_like(logps)
    batch = Batch(logps, flat, flat, flat == 0, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 2.0)
    assert close(batch.loss("dpo"), 2.0 * (1e5 - 1))
    assert batch.gradient("dpo").flatten().tolist() == [-2.0, 2.0]


# --- Identities ------------------------------------------------------------------------------------------------------


def sequence_gradient(batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient with respect to log-probs of sequences."""
    leaf = batch.summed(batch.logps).requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def returns(batch: Batch, logps_N: Tensor) -> Tensor:
    """R - beta (l - r)."""
    return batch.rewards - batch.beta * (logps_N - batch.summed(batch.refs))


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_reinforce_with_its_kl_in_the_reward_is_gvpo(k: int) -> None:
    batch = stale_batch(k, [k, k, k])
    factor = (k - 1) / (batch.beta * k)
    assert close(batch.gradient("reinforce"), factor * batch.gradient("gvpo"))


@pytest.mark.parametrize("sizes", [[2], [3, 3], [2, 1, 5, 3]])
def test_rloo_on_its_own_samples_is_gvpo(sizes: list[int]) -> None:
    batch = stale_batch(20, sizes)
    batch = replace(batch, old=batch.logps)
    assert close(batch.gradient("rloo"), batch.gradient("gvpo") / batch.beta)


@pytest.mark.parametrize("sizes", [[2, 2], [5], [2, 1, 5, 3]])
def test_rebel_over_all_pairs_is_gvpo(sizes: list[int]) -> None:
    batch = stale_batch(21, sizes)
    assert close(batch.loss("rebel"), 4 / batch.beta**2 * batch.loss("gvpo"))
    assert close(batch.gradient("rebel"), 4 / batch.beta**2 * batch.gradient("gvpo"))


def test_ipo_is_gvpo_on_pairs_whose_rewards_differ_by_a_half() -> None:
    batch = stale_batch(22, [2, 2, 1, 2])
    for group in batch.groups():
        batch.rewards[group] = torch.tensor([0.2, 0.7], dtype=torch.float64) + 10 * torch.rand(1).double()
    assert close(batch.loss("ipo"), 4 / batch.beta**2 * batch.loss("gvpo"))
    assert close(batch.gradient("ipo"), 4 / batch.beta**2 * batch.gradient("gvpo"))
    # For three members it is not: the middle one would have to be a half from both.
    three = stale_batch(22, [3])
    three = replace(three, rewards=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert not close(three.gradient("ipo"), 4 / three.beta**2 * three.gradient("gvpo"))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_kimis_loss_is_gvpo_with_the_mean_log_ratio_held_at_zero(k: int) -> None:
    batch = stale_batch(23, [k, k], beta=0.5)

    def mean_term(logps_N: Tensor) -> Tensor:
        means = [(logps_N - batch.summed(batch.refs))[group].mean() for group in batch.groups()]
        return (batch.beta * torch.stack(means)).square().mean() * k / (2 * (k - 1))

    # Kimi's sum of squares over 2(k - 1), as in gvpo_loss.
    scaled = batch.beta * k / (k - 1) * batch.loss("kimi_pmd")
    logps_N = batch.summed(batch.logps)
    assert close(scaled, batch.loss("gvpo") + mean_term(logps_N))

    def ours(name: str, scale: float = 1.0) -> Tensor:
        function = OBJECTIVES[name].loss
        return sequence_gradient(
            batch,
            lambda leaf: scale * function(leaf, batch.summed(batch.refs), batch.rewards, batch.ids, beta=batch.beta),
        )

    extra = sequence_gradient(batch, mean_term)
    assert close(ours("kimi_pmd", batch.beta * k / (k - 1)), ours("gvpo") + extra)
    assert extra.abs().max() > 0.01


@pytest.mark.parametrize("k", [2, 3, 6])
def test_contrastive_policy_gradient_is_gvpo(k: int) -> None:
    batch = stale_batch(24, [k, k])

    def copg(logps_N: Tensor) -> Tensor:
        """1/(k - 1) sum over pairs of (a_i - a_j)^2 (arXiv 2406.19185)."""
        a = returns(batch, logps_N)
        sums = [
            torch.stack([(a[i] - a[j]) ** 2 for i, j in itertools.combinations(group, 2)]).sum() / (k - 1)
            for group in batch.groups()
        ]
        return torch.stack(sums).mean()

    # sum over pairs = k sum_i (a_i - abar)^2, and gvpo_loss is that sum over 2(k - 1).
    assert close(copg(batch.summed(batch.logps)), 2 * k * batch.loss("gvpo"))
    refs = batch.summed(batch.refs)
    gvpo_gradient = sequence_gradient(
        batch, lambda leaf: OBJECTIVES["gvpo"].loss(leaf, refs, batch.rewards, batch.ids, beta=batch.beta)
    )
    assert close(sequence_gradient(batch, copg), 2 * k * gvpo_gradient)


def test_ablations_are_terms_of_gvpos_gradient() -> None:
    batch = stale_batch(25, [3, 1, 2, 4])
    beta, refs = batch.beta, batch.summed(batch.refs)

    def term(name: str) -> Tensor:
        leaf = batch.logps.clone().requires_grad_()
        moments = gvpo_components(batch.summed(leaf), refs, batch.rewards, batch.ids, beta=beta)
        return torch.autograd.grad(moments[name], leaf)[0]

    reward, covariance, variance = -beta * term("reward_cov"), -(beta**2) * term("ref_cov"), beta**2 / 2 * term("var")
    assert close(batch.gradient("gvpo_no_cov_var"), reward)
    assert close(batch.gradient("gvpo_no_cov"), reward + variance)
    assert close(batch.gradient("gvpo_no_var"), reward + covariance)
    sum_of_both = batch.gradient("gvpo_no_cov") + batch.gradient("gvpo_no_var")
    assert close(sum_of_both - batch.gradient("gvpo_no_cov_var"), batch.gradient("gvpo"))


@pytest.mark.parametrize("k", [2, 5])
def test_the_rewards_term_alone_is_reinforce_with_a_mean_baseline(k: int) -> None:
    batch = stale_batch(26, [k, k])
    plain_reinforce = replace(batch, beta=0.0).gradient("reinforce")
    assert close(batch.gradient("gvpo_no_cov_var"), batch.beta * k / (k - 1) * plain_reinforce)


def test_where_the_regressions_are_at_rest() -> None:
    batch = stale_batch(27, [3, 4], beta=0.5)
    batch.mask[:] = True
    drift = {group[0]: 5.0 * n - 20 for n, group in enumerate(batch.groups())}

    def at(targets_N: Tensor) -> Batch:
        share = (targets_N - batch.summed(batch.logps)) / batch.logps.shape[1]
        return replace(batch, logps=batch.logps + share[:, None])

    def offset(per_group: dict[int, float]) -> Tensor:
        values = torch.zeros(7, dtype=torch.float64)
        for group in batch.groups():
            values[group] = per_group[group[0]]
        return values

    refs, scaled, moved = batch.summed(batch.refs), batch.rewards / batch.beta, offset(drift)
    optimum = at(refs + scaled + moved)
    for name in ("gvpo", "reinforce", "rebel"):
        assert optimum.gradient(name).abs().max() < 1e-9
        assert batch.gradient(name).abs().max() > 0.1
    # Kimi's is at rest where the log-ratios are centred too, and without the covariance the reference is forgotten.
    assert optimum.gradient("kimi_pmd").abs().max() > 0.1
    means = offset({group[0]: float(scaled[group].mean()) for group in batch.groups()})
    assert at(refs + scaled - means).gradient("kimi_pmd").abs().max() < 1e-9
    assert at(scaled + moved).gradient("gvpo_no_cov").abs().max() < 1e-9
    assert optimum.gradient("gvpo_no_cov").abs().max() > 0.1


def test_preferences_between_two_are_a_logistic_loss() -> None:
    # Implicit rewards 0.5 x (1 - (-2)) apart, the better one first: log(1 + e^-1.5), slope -0.5 / (1 + e^1.5).
    refs = torch.tensor([[-3.0], [-4.0]], dtype=torch.float64)
    logps = refs + torch.tensor([[1.0], [-2.0]])
    batch = Batch(logps, refs, refs, refs < 0, torch.tensor([2, 1]), torch.tensor([0, 0]), 0.5)
    assert close(batch.loss("dpo"), math.log1p(math.exp(-1.5)))
    slope = 0.5 / (1 + math.exp(1.5))
    assert close(batch.gradient("dpo").flatten(), torch.tensor([-slope, slope], dtype=torch.float64))
    worse = replace(batch, rewards=torch.tensor([1, 2]))
    assert close(worse.loss("dpo"), math.log1p(math.exp(1.5)))


def test_dr_grpo_is_grpo_without_its_two_divisions() -> None:
    batch = stale_batch(28, [4], beta=0.0)
    batch.mask[:] = True
    spread = statistics.stdev(batch.rewards.tolist()) + 1e-4
    # At equal lengths T: GRPO divides by T and the spread, Dr. GRPO by LONGEST.
    ratio = LONGEST / batch.logps.shape[1] / spread
    assert close(batch.gradient("grpo"), ratio * batch.gradient("dr_grpo"))
    fresh = replace(batch, old=batch.logps)
    assert close(fresh.gradient("dr_grpo"), fresh.gradient("reinforce") / LONGEST)


def test_grpos_advantages_do_not_depend_on_the_rewards_scale() -> None:
    batch = stale_batch(29, [4, 3], beta=0.0)
    shifted = replace(batch, rewards=1e6 * batch.rewards - 3e6)
    large = replace(batch, rewards=1e6 * batch.rewards)  # where 1e-4 is nothing
    assert torch.allclose(shifted.gradient("grpo"), large.gradient("grpo"), rtol=1e-6)


# --- Refusals --------------------------------------------------------------------------------------------------------


def arguments(name: str) -> dict[str, Any]:
    batch = stale_batch(30, [2])
    common = {"rewards_N": batch.rewards, "group_ids_N": batch.ids, "beta": 0.5}
    if name in TOKENS:
        tokens = {"logps_NT": batch.logps, "old_logps_NT": batch.old, "ref_logps_NT": batch.refs}
        return {**tokens, "mask_NT": batch.mask, **common}
    return {"logps_N": batch.summed(batch.logps), "ref_logps_N": batch.summed(batch.refs), **common}


def refused(name: str, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        OBJECTIVES[name].loss(**arguments(name) | changes)
    assert type(caught.value) is error and "\n" not in str(caught.value)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(name: str, dtype: torch.dtype) -> None:
    for argument, values in arguments(name).items():
        if "logps" in argument:
            refused(name, TypeError, f"{argument} is {dtype}: cast the model output", **{argument: values.to(dtype)})
    refused(name, TypeError, f"rewards_N is {dtype}", rewards_N=torch.zeros(2, dtype=dtype))


@every
def test_bad_arguments_are_named(name: str) -> None:
    refused(name, ValueError, "rewards_N has 3 members", rewards_N=torch.zeros(3))
    refused(name, ValueError, "group_ids_N has 1 members", group_ids_N=torch.zeros(1, dtype=torch.long))
    refused(name, TypeError, "group_ids_N is torch.float32", group_ids_N=torch.zeros(2))
    refused(name, ValueError, "denominator must not be negative", denominator=-1)
    refused(name, ValueError, "denominator is 0 with 1 group", denominator=0)
    refused(name, TypeError, "beta must be a number", beta="0.1")
    refused(name, ValueError, "beta must be finite", beta=math.nan)
    refused(name, ValueError, "beta must", beta=-0.1)
    if OBJECTIVES[name].takes_zero_beta:
        assert math.isfinite(OBJECTIVES[name].loss(**arguments(name) | {"beta": 0}))
    else:
        refused(name, ValueError, "beta must be greater than 0", beta=0)


@on_tokens
def test_bad_tokens_are_named(name: str) -> None:
    given = arguments(name)
    wide = torch.zeros(2, 6, dtype=torch.float64)
    refused(name, TypeError, "mask_NT is torch.int64: give bool", mask_NT=given["mask_NT"].long())
    refused(name, TypeError, "mask_NT must be a torch.Tensor", mask_NT=given["mask_NT"].tolist())
    refused(name, ValueError, r"mask_NT is \(2, 6\)", mask_NT=wide.bool())
    for argument in ("old_logps_NT", "ref_logps_NT"):
        refused(name, TypeError, f"{argument} is torch.int64", **{argument: given[argument].long()})
        refused(name, ValueError, rf"{argument} is \(2, 6\) .* and logps_NT \(2, 5\)", **{argument: wide})
        refused(name, ValueError, f"{argument} is .* on meta", **{argument: given[argument].to("meta")})
    refused(name, ValueError, "logps_NT must have rank 2", logps_NT=torch.zeros(2))
    refused(name, ValueError, "epsilon must be greater than 0", epsilon=0)
    refused(name, ValueError, "epsilon must be finite", epsilon=math.inf)
    if "max_completion_length" in OBJECTIVES[name].settings:
        refused(name, ValueError, "max_completion_length must be greater than 0", max_completion_length=0)
