"""GRPO in the population: rewards divided by the policy's own spread (GRPO: arXiv 2402.03300; derived here).

With the advantage (R - E R) / sigma held fixed, an exact step of E[advantage] - beta KL leads to
pi_ref exp(R / (beta sigma)) / Z; sigma is then the new policy's, and the tilt 1 / (beta sigma) grows until it agrees
with itself, or forever. Not covered: clipping, token averages, finite groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.claim import Claim, above, below, claim, near, shown
from gvpo.lab.policies import Problem, softmax_table, total_variation, variance
from gvpo.lab.policy_gradients import constrained_reward, slope

ANSWERS, SEED, DRAWS, STEPS = 50, 0, 200, 2000
STOPS, COLLAPSES = 1.0, 0.3


class Tilted(NamedTuple):
    """Where GRPO ends: the log-probs, the tilt at each step, and the gradient that is left."""

    problem: Problem
    policy: Tensor
    tilts: list[float]
    gradient: float


class Grpo(NamedTuple):
    """Both betas, and the share of other reward draws where it stops."""

    ends: dict[float, Tilted]
    share_that_stops: float


def measure() -> Grpo:
    """A uniform reference over 50 answers, rewards drawn uniformly in [0, 1]."""
    rewards_DA = torch.rand(DRAWS, ANSWERS, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    stays = [_tilt(rewards_DA[draw], STOPS)[1][-1] < _hopeless(rewards_DA[draw]) for draw in range(DRAWS)]
    return Grpo({beta: _end(rewards_DA[0], beta) for beta in (STOPS, COLLAPSES)}, sum(stays) / DRAWS)


def claims(measured: Grpo) -> list[Claim]:
    """It stops at its own tilt, or collapses; far from pi* in both."""
    stopped, collapsed = measured.ends[STOPS], measured.ends[COLLAPSES]
    sigma = variance(stopped.policy.exp(), stopped.problem.rewards_A) ** 0.5
    return [
        claim(
            "policy-gradients/grpo-stops",
            f"GRPO tilts by R/(beta sigma), sigma the policy's own spread. {ANSWERS} answers, rewards uniform in "
            f"[0, 1], beta = {STOPS:g}: it stops where the tilt agrees with itself, not at pi*.",
            near("tilt x beta x sigma", stopped.tilts[-1] * STOPS * sigma, 1.0, 1e-9),
            below("gradient left", stopped.gradient, 1e-9),
            above("TV to pi*", total_variation(stopped.policy, stopped.problem.optimum()), 0.3),
            shown("tilt; pi*'s is 1", stopped.tilts[-1]),
            shown(f"share of {DRAWS} draws so", measured.share_that_stops),
        ),
        claim(
            "policy-gradients/grpo-collapses",
            f"beta = {COLLAPSES:g}: no tilt agrees with itself, and it collapses to the best answer.",
            below("largest tilt x beta x sigma", _agreement(collapsed.problem), 1.0),
            above("best answer's probability", float(collapsed.policy.exp().max()), 0.999),
            above("TV to pi*", total_variation(collapsed.policy, collapsed.problem.optimum()), 0.3),
        ),
    ]


def _end(rewards_A: Tensor, beta: float) -> Tilted:
    problem = Problem(torch.zeros(ANSWERS, dtype=torch.float64).log_softmax(0), rewards_A, beta)
    policy, tilts = _tilt(rewards_A, beta)
    sigma = variance(policy.exp(), rewards_A) ** 0.5
    fixed = Problem(problem.reference_A, rewards_A / max(sigma, 1e-12), beta)
    left_E = slope(softmax_table(ANSWERS), lambda logps_A: constrained_reward(logps_A, fixed), policy)
    return Tilted(problem, policy, tilts, float(left_E.abs().max()))


def _tilt(rewards_A: Tensor, beta: float) -> tuple[Tensor, list[float]]:
    """Exact steps from the uniform reference, until the tilt settles or is beyond hope."""
    policy, tilts = torch.zeros_like(rewards_A).log_softmax(0), [0.0]
    for _ in range(STEPS):
        tilts.append(1 / (beta * variance(policy.exp(), rewards_A) ** 0.5))
        policy = (tilts[-1] * rewards_A).log_softmax(0)
        if tilts[-1] - tilts[-2] < 1e-13 * tilts[-1] or tilts[-1] > _hopeless(rewards_A):
            break
    return policy, tilts


def _agreement(problem: Problem) -> float:
    """The largest tilt x beta x sigma(tilt) of any tilt there is; below 1 none agrees with itself."""
    tilts = torch.logspace(-2, 5, 2000, dtype=torch.float64).tolist()
    sigmas = [variance((tilt * problem.rewards_A).softmax(0), problem.rewards_A) ** 0.5 for tilt in tilts]
    return max(tilt * problem.beta * sigma for tilt, sigma in zip(tilts, sigmas, strict=True))


def _hopeless(rewards_A: Tensor) -> float:
    """A tilt that leaves the second-best answer e^-30 of the best one's probability."""
    best, second = rewards_A.topk(2).values
    return float(30 / (best - second))
