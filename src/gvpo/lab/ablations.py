"""The ablation: where the objective leads without its covariance term, its variance term, or both.

arXiv 2504.19599 reports that training diverges or collapses without them; on finite problems one sees where to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.claim import Check, Claim, above, below, claim
from gvpo.lab.descent import Law, minimise
from gvpo.lab.expectation import Draws, draws_with_replacement, expected_components, expected_surrogate
from gvpo.lab.policies import Problem, random_logits, random_problem, softmax_table, spread, total_variation

ANSWERS, BETA, STEPS, RATE = 8, 0.3, 600, 10.0
TABLE = softmax_table(ANSWERS)
NO_COVARIANCE, NO_VARIANCE, REWARD = ("reward", "variance"), ("reward", "covariance"), ("reward",)


class Run(NamedTuple):
    """Gradient ascent without an end: the log-probs, and the spread of the logits half-way and at the end."""

    policy: Tensor
    spreads: tuple[float, float]


class Ablations(NamedTuple):
    """The problem; the minimisers that exist (by sampling law for the one without covariance); the runs, by law."""

    problem: Problem
    whole: Tensor
    no_covariance: dict[str, Tensor]
    no_variance: dict[str, Run]
    reward: dict[str, Run]
    skewed_A: Tensor


def measure() -> Ablations:
    """One softmax table whose likeliest, best, and best-of-both answers are three different ones."""
    problem = make_problem()
    skewed_A = random_logits(TABLE, seed=20, scale=1.0).softmax(0)
    uniform_A = torch.full((ANSWERS,), 1 / ANSWERS, dtype=torch.float64)
    start_E = random_logits(TABLE, seed=21, scale=0.5)
    laws: dict[str, Law] = {"uniform": lambda _: uniform_A, "on-policy": lambda probs_A: probs_A}
    fixed = {"uniform": uniform_A, "reference": problem.reference_A.exp(), "skewed": skewed_A}
    return Ablations(
        problem,
        _minimum(problem, uniform_A, ("reward", "covariance", "variance"), start_E),
        {name: _minimum(problem, law_A, NO_COVARIANCE, start_E) for name, law_A in fixed.items()},
        {
            name: _run(problem, law, NO_VARIANCE, start_E)
            for name, law in {**laws, "skewed": lambda _: skewed_A}.items()
        },
        {name: _run(problem, law, REWARD, start_E) for name, law in laws.items()},
        skewed_A,
    )


def make_problem() -> Problem:
    """Rewards and a reference such that argmax R, argmax pi_ref and argmax R + beta log pi_ref all differ."""
    return next(
        problem
        for problem in (random_problem(TABLE, seed=seed, beta=BETA) for seed in range(1000))
        if len({int(values_A.argmax()) for values_A in (problem.rewards_A, problem.reference_A, tilted(problem))}) == 3
        and min(_lead(problem.rewards_A), _lead(tilted(problem))) > 0.1
    )


def tilted(problem: Problem) -> Tensor:
    """R + beta log pi_ref: what is maximised without the variance term."""
    return problem.rewards_A + problem.beta * problem.reference_A


def skewed_winner(measured: Ablations) -> int:
    """The answer that a fixed law q favours without the variance term: argmax of q (A - E_q A)."""
    values_A, law_A = tilted(measured.problem), measured.skewed_A
    return int((law_A * (values_A - law_A @ values_A)).argmax())


def claims(measured: Ablations) -> list[Claim]:
    """Each ablation, and the whole objective beside them."""
    problem = measured.problem
    plain_A = (problem.rewards_A / BETA).log_softmax(0)
    ends = measured.no_covariance.values()
    return [
        claim(
            "ablations/none",
            "With all three terms the end is pi*.",
            below("TV to pi*", total_variation(measured.whole, problem.optimum()), 1e-6),
        ),
        claim(
            "ablations/no-covariance",
            "Without the covariance term the reference is forgotten: the end is exp(R/beta)/Z, whoever samples.",
            below("TV to exp(R/beta)/Z", max(total_variation(end, plain_A) for end in ends), 1e-6),
            above("TV of that to pi*", total_variation(plain_A, problem.optimum()), 0.3),
        ),
        claim(
            "ablations/no-variance",
            "Without the variance term it runs to the argmax of R + beta log pi_ref, logits unbounded (sampled "
            "uniformly or from the policy).",
            *_run_checks(measured.no_variance, ("uniform", "on-policy"), int(tilted(problem).argmax())),
        ),
        claim(
            "ablations/no-variance-skewed",
            "Under another fixed law q it runs elsewhere: to the argmax of q (A - E_q A), A = R + beta log pi_ref.",
            *_run_checks(measured.no_variance, ("skewed",), skewed_winner(measured)),
        ),
        claim(
            "ablations/reward-alone",
            "Without both it runs to the argmax of R, logits unbounded (sampled uniformly or from the policy).",
            *_run_checks(measured.reward, ("uniform", "on-policy"), int(problem.rewards_A.argmax())),
        ),
    ]


def _run_checks(runs: dict[str, Run], laws: Sequence[str], answer: int) -> list[Check]:
    checks = []
    for law in laws:
        run = runs[law]
        checks += [
            above(f"{law}: its probability", float(run.policy[answer].exp()), 0.99),
            above(f"{law}: spread grown, nats", run.spreads[1] - run.spreads[0], 0.3),
        ]
    return checks


def _minimum(problem: Problem, law_A: Tensor, components: Sequence[str], start_E: Tensor) -> Tensor:
    draws = draws_with_replacement(law_A, 2)
    return minimise(TABLE, lambda logps_A: _ablated(logps_A, problem, draws, components), start_E).policy


def _ablated(logps_A: Tensor, problem: Problem, draws: Draws, components: Sequence[str]) -> Tensor:
    """The terms' value, which a line search needs, with the gradient of the switched weights, which training takes."""
    moments = expected_components(logps_A.detach(), problem, draws)
    terms = {
        "reward": -problem.beta * moments["reward_cov"],
        "covariance": -(problem.beta**2) * moments["ref_cov"],
        "variance": problem.beta**2 / 2 * moments["var"],
    }
    value = torch.stack([terms[name] for name in components]).sum()
    surrogate = expected_surrogate(logps_A, problem, draws, components)
    return value + surrogate - surrogate.detach()


def _run(problem: Problem, law: Law, components: Sequence[str], start_E: Tensor) -> Run:
    logits_E, spreads = start_E, []
    for step in range(1, STEPS + 1):
        leaf_E = logits_E.clone().requires_grad_()
        logps_A = TABLE.logps(leaf_E)
        draws = draws_with_replacement(law(logps_A.detach().exp()), 2)
        (slope_E,) = torch.autograd.grad(expected_surrogate(logps_A, problem, draws, components), leaf_E)
        logits_E = logits_E - RATE * slope_E
        if step in (STEPS // 2, STEPS):
            spreads.append(spread(logits_E))
    return Run(TABLE.logps(logits_E), (spreads[0], spreads[1]))


def _lead(values_A: Tensor) -> float:
    best, second = values_A.topk(2).values
    return float(best - second)
