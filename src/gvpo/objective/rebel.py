"""REBEL: differences of log-ratios regressed onto differences of rewards, over every two members of a group.

    loss = mean over pairs of  [(l_i - r_i) - (l_j - r_j) - (R_i - R_j)/beta]^2, averaged over groups with k >= 2

The paper draws two completions a prompt, and has beta^2 times this. Over all pairs of k members it is 4/beta^2 times
`gvpo_loss`, for every k.
Source: arXiv 2404.16767, algorithm 1, with eta written 1/beta.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, members
from gvpo.objective.pairs import all_pairs


def rebel_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Squared error of relative rewards, pair by pair. Arguments, result and errors are those of `gvpo_loss`."""
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, above=0)
    pairs = all_pairs(groups)
    residuals_Q = pairs.difference(logps_N - ref_logps_N) - pairs.difference(rewards_N) / beta
    return pairs.mean(residuals_Q**2, groups, denominator)
