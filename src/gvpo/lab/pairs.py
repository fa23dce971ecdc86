"""Pairs: what DPO and GVPO with k = 2 can and cannot pin down (DPO: arXiv 2305.18290)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo import objective
from gvpo.lab.claim import Check, Claim, above, below, claim, shown
from gvpo.lab.descent import minimise
from gvpo.lab.policies import Problem, softmax_table, spread, total_variation

TABLE = softmax_table(4)
APART, CHAIN = [(0, 1), (2, 3)], [(0, 1), (1, 2), (2, 3)]
ALL_PAIRS = [(a, b) for a in range(4) for b in range(4)]
PROBLEM = Problem(
    torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log(),
    torch.tensor([math.log(3), 0, math.log(3), 0], dtype=torch.float64),
    beta=1.0,
)
"""Rewards log 3 apart: the better of two wins 3 times in 4 (Bradley-Terry), so labels can be listed exactly."""
LEAST = {"GVPO": 0.0, "DPO": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))}
"""The least loss there is: no residual, and the entropy of the labels."""

STARTS = (torch.tensor([0.0, 0, 0, 0], dtype=torch.float64), torch.tensor([2.0, 2, -1, -1], dtype=torch.float64))
MARKS = (100, 200, 400, 800, 1600)

Loss = Callable[[Tensor], Tensor]


class Pairs(NamedTuple):
    """Ends from both starts, by method, on two pairs and on all; on a chain DPO's spread and GVPO's end."""

    apart: dict[str, list[Tensor]]
    apart_losses: dict[str, list[float]]
    everywhere: dict[str, list[Tensor]]
    dpo_spreads: list[float]
    dpo_losses: list[float]
    gvpo_hard: Tensor


def measure() -> Pairs:
    """Soft labels and rewards that agree with them; then the same hard labels for both."""
    apart = {"GVPO": gvpo_on(APART), "DPO": dpo_on(APART)}
    everywhere = {"GVPO": gvpo_on(ALL_PAIRS), "DPO": dpo_on(ALL_PAIRS)}
    ends = {name: _ends(loss) for name, loss in apart.items()}
    spreads, losses = _descend(_hard(CHAIN, objective.dpo_loss))
    return Pairs(
        ends,
        {name: [float(apart[name](policy)) for policy in policies] for name, policies in ends.items()},
        {name: _ends(loss) for name, loss in everywhere.items()},
        spreads,
        losses,
        minimise(TABLE, _hard(CHAIN, objective.gvpo_loss), STARTS[0]).policy,
    )


def claims(measured: Pairs) -> list[Claim]:
    """What both leave open, what full support closes, and what hard labels do."""
    optimum_A = PROBLEM.optimum()
    wins_A = torch.tensor([3.0, 2, 1, 0], dtype=torch.float64)
    hard_A = (PROBLEM.reference_A + wins_A / PROBLEM.beta).log_softmax(0)
    growth = [b - a for a, b in pairwise(measured.dpo_spreads)]
    return [
        claim(
            "pairs/components",
            "On the pairs (0, 1) and (2, 3) alone, GVPO with k = 2 and DPO alike fix each pair's margin and no more: "
            "one constant per connected component is free, and policies far apart have the same, least loss.",
            *(check for name in measured.apart for check in _apart_checks(measured, name)),
        ),
        claim(
            "pairs/full-support",
            "Pairs drawn i.i.d. with full support leave GVPO one minimiser, pi*. Bradley-Terry labels on them leave "
            "DPO the same one.",
            *(
                below(f"{name}: largest TV to pi*", max(total_variation(end, optimum_A) for end in ends), 1e-6)
                for name, ends in measured.everywhere.items()
            ),
        ),
        claim(
            "pairs/hard-labels-dpo",
            "Hard labels on a chain 0 > 1 > 2 > 3: DPO has no finite minimiser; its loss keeps falling and the logits "
            f"grow with every doubling of {MARKS[0]} steps.",
            above("smallest growth, nats", min(growth), 0.5),
            above("loss left", measured.dpo_losses[-1], 0.0),
            below("loss, last by first", measured.dpo_losses[-1] / measured.dpo_losses[0], 0.2),
            shown("spread of logits", measured.dpo_spreads),
        ),
        claim(
            "pairs/hard-labels-gvpo",
            "The same labels as rewards 1 and 0: GVPO's minimiser is finite, pi_ref exp(wins/beta)/Z.",
            below("TV to it", total_variation(measured.gvpo_hard, hard_A), 1e-6),
            below("spread of logits", spread(measured.gvpo_hard), 6.0),
        ),
    ]


def gvpo_on(pairs: list[tuple[int, int]]) -> Loss:
    """The library's loss on these pairs, with the problem's rewards."""
    answers_N, ids_N = _columns(pairs)
    rewards_N, refs_N = PROBLEM.rewards_A[answers_N], PROBLEM.reference_A[answers_N]
    return lambda logps_A: objective.gvpo_loss(logps_A[answers_N], refs_N, rewards_N, ids_N, beta=PROBLEM.beta)


def dpo_on(pairs: list[tuple[int, int]]) -> Loss:
    """DPO's on these pairs, each listed four times: who wins how often is Bradley-Terry's of the problem's rewards."""
    labelled = [
        (a, b) if win < 4 * torch.sigmoid(PROBLEM.rewards_A[a] - PROBLEM.rewards_A[b]) - 0.5 else (b, a)
        for a, b in pairs
        if a != b
        for win in range(4)
    ]
    return _hard(labelled, objective.dpo_loss)


def _hard(pairs: list[tuple[int, int]], loss: Callable[..., Tensor]) -> Loss:
    """A loss on pairs whose first member wins: rewards 1 and 0."""
    answers_N, ids_N = _columns(pairs)
    refs_N, labels_N = PROBLEM.reference_A[answers_N], torch.tensor([1.0, 0.0]).repeat(len(pairs))
    return lambda logps_A: loss(logps_A[answers_N], refs_N, labels_N, ids_N, beta=PROBLEM.beta)


def _columns(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(pairs).flatten(), torch.arange(len(pairs)).repeat_interleave(2)


def _ends(loss: Loss) -> list[Tensor]:
    return [minimise(TABLE, loss, start_E).policy for start_E in STARTS]


def _descend(loss: Loss) -> tuple[list[float], list[float]]:
    """Plain gradient descent: the spread of the logits and the loss at each mark."""
    logits_E, spreads, losses = STARTS[0].clone().requires_grad_(), [], []
    for step in range(1, MARKS[-1] + 1):
        value = loss(TABLE.logps(logits_E))
        (slope_E,) = torch.autograd.grad(value, logits_E)
        logits_E = (logits_E.detach() - 4.0 * slope_E).requires_grad_()
        if step in MARKS:
            spreads.append(spread(logits_E.detach()))
            losses.append(float(value.detach()))
    return spreads, losses


def _apart_checks(measured: Pairs, name: str) -> list[Check]:
    one, two = measured.apart[name]
    gap_A = one - two
    within = max(abs(float(gap_A[a] - gap_A[b])) for a, b in APART)
    return [
        below(
            f"{name}: loss over the least", max(abs(loss - LEAST[name]) for loss in measured.apart_losses[name]), 1e-12
        ),
        below(f"{name}: gap in margins", within, 1e-5),
        above(f"{name}: TV between two", total_variation(one, two), 0.3),
    ]
