"""Direct preference optimization on the pairs that a group's rewards make: every two members, the better one wins.

    loss = -mean over pairs of  log sigmoid(beta [(l_w - r_w) - (l_l - r_l)]), averaged over groups with k >= 2

Only the order of the rewards counts. A group of equal rewards has no pair and adds 0.
Source: arXiv 2305.18290, equation 7.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from gvpo.objective.members import check_real, members
from gvpo.objective.pairs import preference_pairs


def dpo_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Logistic loss on differences of implicit rewards. Arguments, result and errors are those of `gvpo_loss`."""
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, above=0)
    pairs = preference_pairs(rewards_N, groups)
    return -pairs.mean(logsigmoid(beta * pairs.difference(logps_N - ref_logps_N)), groups, denominator)
