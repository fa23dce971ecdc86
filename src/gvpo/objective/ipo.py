"""Identity preference optimization on the pairs that a group's rewards make: every two members, the better one wins.

    loss = mean over pairs of  [(l_w - r_w) - (l_l - r_l) - 1/(2 beta)]^2, averaged over groups with k >= 2

Log-probs are summed over tokens, as in the paper's formula. For k = 2 and rewards that differ by 1/2 it is
4/beta^2 times `gvpo_loss`.
Source: arXiv 2310.12036, equation 17, with tau written beta.
"""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.members import check_real, members
from gvpo.objective.pairs import preference_pairs


def ipo_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Squared error of log-ratio differences against 1/(2 beta). Arguments, result and errors: `gvpo_loss`."""
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, above=0)
    pairs = preference_pairs(rewards_N, groups)
    return pairs.mean((pairs.difference(logps_N - ref_logps_N) - 1 / (2 * beta)) ** 2, groups, denominator)
