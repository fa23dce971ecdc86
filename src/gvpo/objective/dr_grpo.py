"""Dr. GRPO: GRPO without its two biases, the division by the rewards' spread and by the completion's length.

    loss = -(1/(k L)) sum_i sum_t [min(rho_it A_i, clip(rho_it, 1 - epsilon, 1 + epsilon) A_i) - beta KL_it],
    averaged over groups with k >= 2;   A_i = R_i - Rbar,   L a constant

Source: arXiv 2503.20783; numbers as TRL's loss_type="dr_grpo" with scale_rewards="none", L = max_completion_length.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, token_members
from gvpo.objective.ratios import clipped_surrogate, kl_estimates


def dr_grpo_loss(
    logps_NT: Tensor,
    old_logps_NT: Tensor,
    ref_logps_NT: Tensor,
    mask_NT: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    epsilon: float = 0.2,
    max_completion_length: float = 1.0,
    denominator: float | None = None,
) -> Tensor:
    """Clipped surrogate with centred rewards, a sum over each completion's tokens.

    max_completion_length: the constant L, > 0. It scales the loss, which Adam undoes: gradient clipping sees it.
    Other arguments, result and errors are those of `grpo_loss`.
    """
    batch = token_members(logps_NT, old_logps_NT, ref_logps_NT, mask_NT, rewards_N, group_ids_N, denominator)
    beta, epsilon = check_real("beta", beta, least=0), check_real("epsilon", epsilon, above=0)
    length = check_real("max_completion_length", max_completion_length, above=0)
    advantages_N = batch.groups.centre(batch.rewards_N)
    gains_NT = clipped_surrogate(batch.logps_NT - batch.old_logps_NT, advantages_N[:, None], epsilon)
    gains_NT = gains_NT - beta * kl_estimates(batch.logps_NT, batch.ref_logps_NT)
    return -batch.groups.mean((gains_NT * mask_NT).sum(1) / length / batch.groups.sizes_N, denominator)
