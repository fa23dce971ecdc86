"""Theorem 3: n steps, each against the policy before it, solve one constrained problem against the start.

The paper's convergence guarantee; in this form derived here: exact steps give pi_n ~ pi_0 exp(n R / beta).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from gvpo.lab.claim import Claim, above, below, claim, near, shown
from gvpo.lab.descent import minimise_gvpo
from gvpo.lab.policies import (
    Problem,
    autoregressive_table,
    kl,
    mean,
    random_logits,
    random_problem,
    total_variation,
    variance,
)

STEPS, BETA, TOTAL = 6, 1.0, 0.25
TABLE = autoregressive_table(3, 3)


class Iterations(NamedTuple):
    """Policies after 0..n steps, log-probs; and the end of n steps at n times a total coefficient."""

    problem: Problem
    policies: list[Tensor]
    rescaled: Tensor

    def expected(self, steps: int) -> Tensor:
        """log of pi_0 exp(n R / beta) / Z."""
        return (self.policies[0] + steps * self.problem.rewards_A / self.problem.beta).log_softmax(0)

    def rewards(self) -> list[float]:
        """E[R] after each step, the start first."""
        return [mean(policy.exp(), self.problem.rewards_A) for policy in self.policies]

    def kl_to_start(self) -> list[float]:
        """KL(pi_t || pi_0), nats."""
        return [kl(policy, self.policies[0]) for policy in self.policies]

    def kl_of_steps(self) -> list[float]:
        """KL(pi_{t+1} || pi_t), nats."""
        return [kl(after, before) for before, after in pairwise(self.policies)]

    def bounds(self) -> list[float]:
        """(E_{t+1} R - E_t R) / beta, nats."""
        rewards = self.rewards()
        return [(b - a) / self.problem.beta for a, b in pairwise(rewards)]


def measure() -> Iterations:
    """Exact steps on the autoregressive table, each sampled from the policy that it starts from."""
    start_E = random_logits(TABLE, seed=12, scale=1.0)
    problem = random_problem(TABLE, seed=11, beta=BETA)
    return Iterations(
        problem, _steps(start_E, problem.rewards_A, BETA), _steps(start_E, problem.rewards_A, STEPS * TOTAL)[-1]
    )


def claims(measured: Iterations) -> list[Claim]:
    """The path, its coefficient, its steps, and its length."""
    gaps = [total_variation(policy, measured.expected(t)) for t, policy in enumerate(measured.policies)]
    slack = [bound - step for bound, step in zip(measured.bounds(), measured.kl_of_steps(), strict=True)]
    reverse = [kl(before, after) for before, after in pairwise(measured.policies)]
    whole = (measured.policies[0] + measured.problem.rewards_A / TOTAL).log_softmax(0)
    lengths = measured.kl_to_start()
    return [
        claim(
            "iterations/path",
            f"{STEPS} exact steps, each with the policy before it as reference, pass through pi_0 exp(tR/beta)/Z.",
            below("largest TV to it", max(gaps), 1e-6),
        ),
        claim(
            "iterations/coefficient",
            f"{STEPS} steps maximise E[R] - (beta/{STEPS}) KL(pi || pi_0): the coefficient is beta/n. With n times b "
            f"in each step it is b ({TOTAL:g}).",
            near("beta / coefficient", BETA / _coefficient(measured), STEPS, 1e-5),
            below("TV to one step at b", total_variation(measured.rescaled, whole), 1e-6),
        ),
        claim(
            "iterations/step-bound",
            "Every step obeys KL(pi_t+1 || pi_t) <= (E_t+1 R - E_t R) / beta. What is left is KL(pi_t || pi_t+1).",
            above("smallest slack", min(slack), 0.0),
            below("gap to reverse KL", max(abs(a - b) for a, b in zip(slack, reverse, strict=True)), 1e-6),
        ),
        claim(
            "iterations/kl-to-start",
            "Nothing anchors the path to its start: KL(pi_t || pi_0) grows with every step.",
            above("smallest growth", min(b - a for a, b in pairwise(lengths)), 0.01),
            shown("KL to start, nats", lengths),
        ),
    ]


def _steps(start_E: Tensor, rewards_A: Tensor, beta: float) -> list[Tensor]:
    logits_E, policies = start_E, [TABLE.logps(start_E)]
    for _ in range(STEPS):
        problem = Problem(policies[-1], rewards_A, beta)
        descent = minimise_gvpo(TABLE, problem, policies[-1].exp(), logits_E)
        logits_E = descent.logits_E
        policies.append(descent.policy)
    return policies


def _coefficient(measured: Iterations) -> float:
    """What one step from pi_0 must have as its beta to end here: Var R / Cov(log-ratio, R)."""
    ratio_A = measured.policies[-1] - measured.policies[0]
    law_A, rewards_A = measured.policies[0].exp(), measured.problem.rewards_A
    covariance = mean(law_A, (ratio_A - mean(law_A, ratio_A)) * rewards_A)
    return variance(law_A, rewards_A) / covariance
