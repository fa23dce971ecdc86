"""REINFORCE leave-one-out: whole-sequence ratios, the other members' mean as baseline, the KL term in the reward.

    loss = -(1/k) sum_i min(rho_i A_i, clip(rho_i, 1 - epsilon, 1 + epsilon) A_i), averaged over groups with k >= 2;
    A_i = a_i - mean of a over the others,   a_i = R_i - beta (old_i - r_i),   rho_i = pi(y_i) / pi_old(y_i)

At pi = pi_old its gradient is 1/beta times that of GVPO.
Source: arXiv 2402.14740; numbers as TRL's RLOO (with ratio and clipping, for several updates a rollout).
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, token_members
from gvpo.objective.ratios import clipped_surrogate


def rloo_loss(
    logps_NT: Tensor,
    old_logps_NT: Tensor,
    ref_logps_NT: Tensor,
    mask_NT: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    epsilon: float = 0.2,
    denominator: float | None = None,
) -> Tensor:
    """Clipped surrogate of sequence ratios with leave-one-out returns. Arguments, result, errors: `grpo_loss`."""
    batch = token_members(logps_NT, old_logps_NT, ref_logps_NT, mask_NT, rewards_N, group_ids_N, denominator)
    beta, epsilon = check_real("beta", beta, least=0), check_real("epsilon", epsilon, above=0)
    logps_N, old_N, ref_N = (values.sum(1) for values in (batch.logps_NT, batch.old_logps_NT, batch.ref_logps_NT))
    sizes_N = batch.groups.sizes_N
    # A value less the mean of the k - 1 others is k/(k-1) times the value less the mean of all.
    advantages_N = batch.groups.centre(batch.rewards_N - beta * (old_N - ref_N)) * sizes_N / (sizes_N - 1).clamp(min=1)
    gains_N = clipped_surrogate(logps_N - old_N, advantages_N, epsilon)
    return -batch.groups.mean(gains_N / sizes_N, denominator)
