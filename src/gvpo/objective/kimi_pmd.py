"""Kimi's policy mirror descent: log-ratios fitted to centred rewards, without centring the log-ratios.

    loss = (1/k) sum_i (beta/2) [(R_i - Rbar)/beta - (l_i - r_i)]^2, averaged over groups with k >= 2

The group's mean reward stands for beta log Z. The sum of squares is GVPO's plus k (beta mean(l - r))^2: one term more,
which pulls the mean log-ratio of every group to 0, where at GVPO's optimum it need not be.

Source: Kimi k1.5 (arXiv 2501.12599), equation 3 over 2 tau, which makes its gradient their update; tau written beta.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, members


def kimi_pmd_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Squared error of log-ratios against centred rewards over beta. Arguments, result and errors: `gvpo_loss`."""
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, above=0)
    residuals_N = groups.centre(rewards_N) / beta - (logps_N - ref_logps_N)
    return groups.mean(beta / 2 * residuals_N**2 / groups.sizes_N, denominator)
