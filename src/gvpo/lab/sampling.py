"""Theorem 2: where answers come from does not matter, if every answer can come (arXiv 2504.19599, Corollary 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.claim import Claim, above, below, claim, shown
from gvpo.lab.descent import Descent, Law, minimise_gvpo, minimise_on_policy
from gvpo.lab.expectation import draws_with_replacement, expected_loss
from gvpo.lab.policies import (
    Problem,
    autoregressive_table,
    random_logits,
    random_problem,
    softmax_table,
    total_variation,
)

BETA, ON_POLICY, KEPT, REPLAYED = 0.3, 0.05, 5, 5
TABLES = {"softmax": softmax_table(10), "autoregressive": autoregressive_table(3, 3)}

STATEMENTS = {
    "uniform": "all answers alike",
    "reference": "the reference",
    "current policy": "the policy itself, held fixed within a step and renewed",
    "replayed": "a stale policy, unrelated to the present one",
    "mixed": f"half a replay set of {REPLAYED} answers, half the policy itself",
    "tempered": "the reference at temperature 2",
    "skewed": "an adversary: 90 % on the answer that pi* likes least, the rest falling as pi* rises",
}


class Limited(NamedTuple):
    """Sampling without full support: the law, where two starts end, and where 5 % on-policy takes them from there."""

    law_A: Tensor
    ends: list[Descent]
    losses: list[float]
    loss_at_optimum: float
    mended: list[Descent]


class Sampling(NamedTuple):
    """Descents by table and law; the problem of each table; the limited laws, on the softmax table."""

    problems: dict[str, Problem]
    descents: dict[str, dict[str, Descent]]
    limited: dict[str, Limited]

    def distance(self, table: str, law: str) -> float:
        """Total variation to pi* at the end."""
        return total_variation(self.descents[table][law].policy, self.problems[table].optimum())


def measure() -> Sampling:
    """All laws from the same start, on both tables."""
    problems = {name: random_problem(table, seed=1, beta=BETA) for name, table in TABLES.items()}
    descents = {
        name: {
            law: minimise_on_policy(table, problems[name], function, random_logits(table, seed=7, scale=1.5))
            for law, function in full_support_laws(problems[name]).items()
        }
        for name, table in TABLES.items()
    }
    laws = {"top-k": top_k(problems["softmax"]), "replay set": replay_set(problems["softmax"])}
    return Sampling(problems, descents, {name: _limited(problems["softmax"], law_A) for name, law_A in laws.items()})


def full_support_laws(problem: Problem) -> dict[str, Law]:
    """By name, from the policy's probabilities to the sampling law's."""
    count = len(problem.rewards_A)
    stale_A = torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(0)
    replay_A = replay_set(problem)
    skewed_A = _skewed(problem)
    return {
        "uniform": lambda _: torch.full((count,), 1 / count, dtype=torch.float64),
        "reference": lambda _: problem.reference_A.exp(),
        "current policy": lambda probs_A: probs_A,
        "replayed": lambda _: stale_A,
        "mixed": lambda probs_A: (replay_A + probs_A) / 2,
        "tempered": lambda _: (problem.reference_A / 2).softmax(0),
        "skewed": lambda _: skewed_A,
    }


def top_k(problem: Problem) -> Tensor:
    """The reference cut to its likeliest answers, as a sampler's top-k cuts it."""
    kept = problem.reference_A.topk(KEPT).indices
    law_A = torch.zeros_like(problem.reference_A)
    law_A[kept] = problem.reference_A[kept].softmax(0)
    return law_A


def replay_set(problem: Problem) -> Tensor:
    """A few answers drawn once, each as likely as the others: nothing else is ever seen."""
    seen = torch.randperm(len(problem.rewards_A), generator=torch.Generator().manual_seed(5))[:REPLAYED]
    law_A = torch.zeros_like(problem.reference_A)
    law_A[seen] = 1 / REPLAYED
    return law_A


def claims(measured: Sampling) -> list[Claim]:
    """Theorem 2, its counter-examples, and their mending."""
    full = [
        claim(
            f"sampling/{law.replace(' ', '-')}",
            f"Groups drawn from {what}: the minimiser is pi*.",
            *(below(f"TV to pi*, {table}", measured.distance(table, law), 1e-6) for table in measured.problems),
        )
        for law, what in STATEMENTS.items()
    ]
    optimum_A = measured.problems["softmax"].optimum()
    return full + [
        built for law, limited in measured.limited.items() for built in _limited_claims(law, limited, optimum_A)
    ]


def _limited_claims(law: str, limited: Limited, optimum_A: Tensor) -> list[Claim]:
    name, seen = law.replace(" ", "-"), int((limited.law_A > 0).sum())
    one, two = (descent.policy for descent in limited.ends)
    return [
        claim(
            f"sampling/{name}-alone",
            f"Counter-example: sampling from a {law} alone ({seen} of {len(optimum_A)} answers) leaves pi* a "
            "minimiser, but not the only one: zero loss at two policies far apart.",
            below("loss at pi*", limited.loss_at_optimum, 1e-20),
            below("loss at one", limited.losses[0], 1e-20),
            below("loss at the other", limited.losses[1], 1e-20),
            above("TV between the two", total_variation(one, two), 0.3),
            shown("TV of each to pi*", [total_variation(policy, optimum_A) for policy in (one, two)]),
        ),
        claim(
            f"sampling/{name}-mended",
            f"From both of these, {ON_POLICY:.0%} of on-policy sampling leads to pi*.",
            below("largest TV to pi*", max(total_variation(end.policy, optimum_A) for end in limited.mended), 1e-6),
        ),
    ]


def _limited(problem: Problem, law_A: Tensor) -> Limited:
    table = TABLES["softmax"]
    low_E = random_logits(table, seed=7, scale=1.0)
    # Nothing moves an answer that is never drawn: a start that favours those ends far from one that does not.
    starts = [low_E, low_E + 4.0 * (law_A == 0)]
    ends = [minimise_gvpo(table, problem, law_A, start_E) for start_E in starts]
    draws = draws_with_replacement(law_A, 2)

    def mixed(probs_A: Tensor) -> Tensor:
        return (1 - ON_POLICY) * law_A + ON_POLICY * probs_A

    return Limited(
        law_A,
        ends,
        [float(expected_loss(end.policy, problem, draws)) for end in ends],
        float(expected_loss(problem.optimum(), problem, draws)),
        [minimise_on_policy(table, problem, mixed, end.logits_E) for end in ends],
    )


def _skewed(problem: Problem) -> Tensor:
    optimum_A = problem.optimum()
    law_A = 0.1 * (-optimum_A / 2).softmax(0)
    law_A[optimum_A.argmin()] += 0.9
    return law_A
