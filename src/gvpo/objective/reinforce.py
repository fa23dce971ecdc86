"""REINFORCE with the group's mean reward as baseline, and the KL term inside the reward.

    loss = -(1/k) sum_i A_i l_i, averaged over groups with k >= 2,    A_i = a_i - abar, a constant,
    a_i = R_i - beta (l_i - r_i)

A likelihood weighted by regularised returns: no ratio to the policy that sampled, no clipping. Off-policy it is no
policy gradient, yet it is not arbitrary: its gradient is (k - 1)/(beta k) times that of GVPO, so with
beta > 0 it fits the same optimum. With beta = 0 nothing bounds it.

Source: Williams 1992; the KL inside the reward as in arXiv 1909.08593.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, members


def reinforce_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Minus the log-probs weighted by centred returns. Arguments, result and errors: `gvpo_loss`; beta >= 0."""
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, least=0)
    advantages_N = groups.centre(rewards_N - beta * (logps_N.detach() - ref_logps_N))
    return -groups.mean(advantages_N * logps_N / groups.sizes_N, denominator)
