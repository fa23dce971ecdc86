"""Pairs of members within a group, for the objectives that compare two completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gvpo.objective.members import Groups


class Pairs(NamedTuple):
    """Q ordered pairs: the places of both among the N members, and the group that they are of."""

    first_Q: Tensor
    second_Q: Tensor
    group_Q: Tensor

    def difference(self, values_N: Tensor) -> Tensor:
        """Each pair's first value less its second."""
        return values_N[self.first_Q] - values_N[self.second_Q]

    def mean(self, values_Q: Tensor, groups: Groups, denominator: float | None) -> Tensor:
        """The mean over each group's pairs, averaged over the groups with k >= 2; one without a pair counts as 0."""
        pairs_P = self.group_Q.bincount(minlength=len(groups.sizes_P))
        return groups.average((values_Q / pairs_P[self.group_Q]).sum(), denominator)


def preference_pairs(rewards_N: Tensor, groups: Groups) -> Pairs:
    """Every pair of a group's members with different rewards, the better one first."""
    return _pairs(rewards_N[:, None] > rewards_N[None, :], groups)


def all_pairs(groups: Groups) -> Pairs:
    """Every pair of a group's members, once."""
    n = len(groups.index_N)
    earlier = torch.ones(n, n, dtype=torch.bool, device=groups.index_N.device).triu(1)
    return _pairs(earlier, groups)


def _pairs(chosen_NN: Tensor, groups: Groups) -> Pairs:
    same_NN = groups.index_N[:, None] == groups.index_N[None, :]
    first_Q, second_Q = (same_NN & chosen_NN).nonzero().unbind(1)
    return Pairs(first_Q, second_Q, groups.index_N[first_Q])
