"""Completions in rows that lie anywhere: the objective's slopes on a mini-batch of them, over whole groups.

For trainers that cut a batch as they like, by row, and give a loss one piece at a time: the loss of a piece is the
product of its slopes and its log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gvpo.objective.fit import fit_metrics
from gvpo.objective.gvpo import gvpo_loss


@dataclass(frozen=True, slots=True)
class Rows:
    """Every row of a batch, of all ranks in order: the same on each of them.

    groups_N, members_N: int64 ids; a member is a completion, which an agent loop may give in several rows. rewards_N:
    float64, the member's, in each of its rows. refs_N: float64, reference log-prob of a row's scored tokens, nats.
    live_N: whether a token of the row is scored.
    """

    groups_N: Tensor
    members_N: Tensor
    rewards_N: Tensor
    refs_N: Tensor
    live_N: Tensor

    def of_same_groups(self, here_N: Tensor) -> Tensor:
        """The live rows of all groups that have a live row among these; both bool."""
        return self.live_N & torch.isin(self.groups_N, self.groups_N[here_N & self.live_N])


def row_slopes(rows: Rows, here_N: Tensor, ratios_N: Tensor, beta: float) -> tuple[Tensor, dict[str, float]]:
    """d loss / d log-prob of every row, float64, 0 outside the mini-batch; and the metrics of its groups, loss first.

    here_N: bool, the mini-batch. ratios_N: float64, log pi/pi_ref of a row's scored tokens in nats; looked at for
    `rows.of_same_groups(here_N)`. The loss is the mean of `gvpo_loss` over groups with two live members or more, where
    a group that lies only in part in this mini-batch counts as that part of its rows: over mini-batches the parts add
    up to one.

    Raises ValueError where rows of one member have different rewards, and for numbers that are not finite.
    Source: arXiv 2504.19599, Algorithm 1; a member's rows are parts of its log-prob.
    """
    used_N = rows.of_same_groups(here_N)
    for name, values_N in (("reward", rows.rewards_N), ("reference log-prob", rows.refs_N), ("log-ratio", ratios_N)):
        if not values_N[used_N].isfinite().all():
            raise ValueError(f"a completion's {name} is not finite: {values_N[used_N & ~values_N.isfinite()][0]}")
    here_U = here_N[used_N].double()
    members, member_U = rows.members_N[used_N].unique(return_inverse=True)

    def of_members(values_N: Tensor) -> Tensor:
        """Of each member, the value of one of its rows."""
        values_U = values_N[used_N]
        return values_U.new_zeros(len(members)).scatter_(0, member_U, values_U)

    rewards_M = of_members(rows.rewards_N)
    if not torch.equal(rewards_M[member_U], rows.rewards_N[used_N]):
        raise ValueError("rows of one session have different rewards: give every row its session's reward")
    groups, group_M = of_members(rows.groups_N).unique(return_inverse=True)
    refs_M, ratios_M = (
        torch.zeros(len(members), dtype=torch.float64).index_add_(0, member_U, values_N[used_N])
        for values_N in (rows.refs_N, ratios_N)
    )
    with torch.enable_grad():
        logps_M = (refs_M + ratios_M).requires_grad_()
        loss = gvpo_loss(logps_M, refs_M, rewards_M, group_M, beta=beta, denominator=1.0)
        (slopes_M,) = torch.autograd.grad(loss, logps_M)

    teaches_G = torch.bincount(group_M, minlength=len(groups)) >= 2
    share_G = torch.bincount(group_M[member_U], here_U, len(groups)) / torch.bincount(group_M[member_U])
    count = float(share_G[teaches_G].sum())
    slopes_N = torch.zeros(len(here_N), dtype=torch.float64)
    slopes_N[used_N] = slopes_M[member_U] * here_U / (count or 1.0)
    split = float((share_G[teaches_G] < 1).sum())
    if not teaches_G.any():
        return slopes_N, {"loss": 0.0, "groups": count, "split_groups": split}
    kept_M = teaches_G[group_M]
    logps, refs, rewards, ids = (values_M[kept_M] for values_M in (logps_M.detach(), refs_M, rewards_M, group_M))
    metrics = {"loss": float(loss.detach()) / int(teaches_G.sum()), "groups": count, "split_groups": split}
    metrics |= {"reward": float(rewards.mean()), "members_per_group": len(ids) / int(teaches_G.sum())}
    return slopes_N, metrics | fit_metrics(logps, refs, rewards, ids, beta=beta)
