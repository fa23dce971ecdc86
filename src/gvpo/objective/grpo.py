"""Group Relative Policy Optimization: clipped token ratios, advantages divided by the group's spread.

    loss = -(1/k) sum_i (1/|y_i|) sum_t [min(rho_it A_i, clip(rho_it, 1 - epsilon, 1 + epsilon) A_i) - beta KL_it],
    averaged over groups with k >= 2;   A_i = (R_i - Rbar) / (std R + 1e-4),   rho_it = pi / pi_old of token t

KL_it = exp(-d) + d - 1 with d = log pi/pi_ref of the token. Needs the log-probs of the policy that sampled: in
training, completions from elsewhere that bring none are taken for the policy's own.
Source: arXiv 2402.03300, equation 3; numbers as TRL's loss_type="grpo".
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo.objective.members import Groups, check_real, token_members
from gvpo.objective.ratios import clipped_surrogate, kl_estimates


def grpo_loss(
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
    """Clipped surrogate with standardised advantages, a mean over each completion's tokens.

    logps_NT, old_logps_NT, ref_logps_NT: nats per token, float32 or float64; of the policy, of the policy that sampled
    (the ratio's denominator), and of the reference (for the KL term). Only logps_NT gets a gradient.
    mask_NT: bool, True where a token is scored; what stands elsewhere is not looked at.
    rewards_N, group_ids_N, denominator: as for `gvpo_loss`. beta: weight of the KL term, >= 0. epsilon: > 0.

    Returns a float64 scalar. A completion without tokens adds 0.
    Raises TypeError for a dtype not listed, ValueError for shapes that do not fit or a number out of range.
    """
    batch = token_members(logps_NT, old_logps_NT, ref_logps_NT, mask_NT, rewards_N, group_ids_N, denominator)
    beta, epsilon = check_real("beta", beta, least=0), check_real("epsilon", epsilon, above=0)
    advantages_N = standardised(batch.rewards_N, batch.groups)
    gains_NT = clipped_surrogate(batch.logps_NT - batch.old_logps_NT, advantages_N[:, None], epsilon)
    gains_NT = gains_NT - beta * kl_estimates(batch.logps_NT, batch.ref_logps_NT)
    means_N = (gains_NT * mask_NT).sum(1) / mask_NT.sum(1).clamp(min=1)
    return -batch.groups.mean(means_N / batch.groups.sizes_N, denominator)


def standardised(rewards_N: Tensor, groups: Groups) -> Tensor:
    """Centred rewards over (their group's standard deviation + 1e-4), Bessel-corrected."""
    centred_N = groups.centre(rewards_N)
    deviations_P = torch.sqrt(groups.sums(centred_N**2) / (groups.sizes_P - 1).clamp(min=1))
    return centred_N / (deviations_P[groups.index_N] + 1e-4)
