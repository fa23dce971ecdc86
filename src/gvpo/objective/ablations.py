"""GVPO with terms of its weight left out, as in the paper's ablation: what the covariance and the variance are for.

    loss = -(beta/(k-1)) sum_i w_i l_i, averaged over groups with k >= 2, w_i a constant:
    no covariance:   w_i = (R_i - Rbar) - beta (l_i - lbar)      optimum exp(R / beta) / Z: a uniform reference
    no variance:     w_i = (R_i - Rbar) + beta (r_i - rbar)      none: runs to the argmax of R + beta r
    neither:         w_i = (R_i - Rbar)                          none: runs to the argmax of R

Source: arXiv 2504.19599, the ablation of its experiments. The gradient is what counts; the value only has its scale.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.gvpo import gvpo_weights
from gvpo.objective.members import members


def gvpo_no_cov_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """GVPO without the covariance with the reference. Arguments, result and errors are those of `gvpo_loss`."""
    return _loss(logps_N, ref_logps_N, rewards_N, group_ids_N, beta, denominator, ("reward", "variance"))


def gvpo_no_var_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """GVPO without the variance. Arguments, result and errors are those of `gvpo_loss`."""
    return _loss(logps_N, ref_logps_N, rewards_N, group_ids_N, beta, denominator, ("reward", "covariance"))


def gvpo_no_cov_var_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """GVPO with the reward's term alone. Arguments, result and errors are those of `gvpo_loss`."""
    return _loss(logps_N, ref_logps_N, rewards_N, group_ids_N, beta, denominator, ("reward",))


def _loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    beta: float,
    denominator: float | None,
    components: tuple[str, ...],
) -> Tensor:
    batch = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    weights_N = gvpo_weights(logps_N, ref_logps_N, rewards_N, group_ids_N, beta=beta, components=components)
    # The weights sum to zero, so centring the log-probs changes nothing but the size of the numbers.
    return -beta * batch.groups.mean_covariance(weights_N, batch.groups.centre(batch.logps_N), denominator)
