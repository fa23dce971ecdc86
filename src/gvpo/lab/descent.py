"""Minimisation of an exact expectation: L-BFGS in float64, the sampling law held fixed while it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.lab.expectation import draws_with_replacement, expected_loss
from gvpo.lab.policies import Problem, Table, total_variation

Law = Callable[[Tensor], Tensor]
"""From the current policy's probabilities to the sampling law's."""

STATIONARY, ZERO = 1e-13, 1e-23
"""A gradient whose largest entry is smaller has vanished; a loss below the other is zero but for rounding."""

SCALE = 1e10
"""torch's L-BFGS takes no curvature from steps below a fixed size: a larger loss lets it go on learning it."""

ROUNDS = (20, 40, 80, 160, 320, 320)


class Descent(NamedTuple):
    """Where a minimisation went: the logits at the end; the loss and the log-probs before each step and at the end."""

    logits_E: Tensor
    losses: list[float]
    path: list[Tensor]

    @property
    def policy(self) -> Tensor:
        """Log-probs at the end."""
        return self.path[-1]


def minimise(table: Table, loss_of: Callable[[Tensor], Tensor], start_E: Tensor, *, steps: int = 400) -> Descent:
    """L-BFGS with a strong Wolfe line search on a loss of the answers' log-probs, until the gradient vanishes."""
    logits_E = start_E.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits_E],
        max_iter=1,
        max_eval=25,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )
    losses: list[float] = []
    path: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = SCALE * loss_of(table.logps(logits_E))
        loss.backward()
        return loss

    for _ in range(steps):
        path.append(table.logps(logits_E.detach()))
        losses.append(float(optimizer.step(closure).detach()) / SCALE)  # pyright: ignore[reportArgumentType]
        if abs(losses[-1]) < ZERO or _gradient_size(logits_E) < STATIONARY or _stuck(losses):
            break
    path.append(table.logps(logits_E.detach()))
    losses.append(float(loss_of(path[-1])))
    return Descent(logits_E.detach(), losses, path)


def minimise_gvpo(table: Table, problem: Problem, sampling_A: Tensor, start_E: Tensor) -> Descent:
    """Minimise the expected loss under one sampling law (probabilities)."""
    draws = draws_with_replacement(sampling_A, 2)
    return minimise(table, lambda logps_A: expected_loss(logps_A, problem, draws), start_E)


def minimise_on_policy(table: Table, problem: Problem, law: Law, start_E: Tensor) -> Descent:
    """The same where the law follows the policy: taken from it, held fixed for 20 steps, taken anew for 40, 80, ...

    Ends when a fresh law no longer moves the policy: a stationary point of the gradient that takes samples as given.
    """
    losses, path = [], []
    part = Descent(start_E, [], [table.logps(start_E)])
    for steps in ROUNDS:
        draws = draws_with_replacement(law(part.policy.exp()), 2)
        part = minimise(table, lambda logps_A, d=draws: expected_loss(logps_A, problem, d), part.logits_E, steps=steps)
        losses += part.losses[:-1]
        path += part.path[:-1]
        if steps > ROUNDS[0] and not total_variation(part.path[0], part.policy) > 1e-12:
            break
    return Descent(part.logits_E, [*losses, part.losses[-1]], [*path, part.policy])


def _stuck(losses: list[float]) -> bool:
    """Whether rounding leaves the line search nothing to find."""
    return len(losses) > 5 and losses[-1] >= losses[-6]


def _gradient_size(logits_E: Tensor) -> float:
    assert logits_E.grad is not None
    return float(logits_E.grad.abs().max()) / SCALE
