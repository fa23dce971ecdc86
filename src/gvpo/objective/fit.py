"""How well implicit rewards fit rewards: numbers to watch, of members that are trained on."""

from __future__ import annotations

from torch import Tensor

from gvpo.objective.gvpo import gvpo_components
from gvpo.objective.members import Groups


def fit_metrics(
    logps_N: Tensor, ref_logps_N: Tensor, rewards_N: Tensor, group_ids_N: Tensor, *, beta: float
) -> dict[str, float]:
    """The objective's terms, log-ratios in nats, and what of the rewards' variance is left.

    Arguments are those of `gvpo_components`, float64, of groups of two members and more, one group at least; beta may
    be 0: there is no implicit reward then, nor `constant` and `r2`. reward_var, residual_var: of rewards, and of
    rewards less implicit rewards, within groups, Bessel-corrected, averaged over groups. r2: share of the centred
    rewards' sum of squares that the centred implicit rewards explain (1 at the optimum); left out where all rewards
    are equal. log_ratio/group_std: mean of the groups' own.
    """
    groups = Groups.from_ids(group_ids_N)
    logps_N = logps_N.detach()
    ratios_N = logps_N - ref_logps_N
    rewards, residuals, ratios = (
        groups.centre(values_N).square() for values_N in (rewards_N, rewards_N - beta * ratios_N, ratios_N)
    )
    freedom_N = groups.sizes_N - 1
    # What the components are without a KL term does not depend on beta.
    terms = gvpo_components(logps_N, ref_logps_N, rewards_N, group_ids_N, beta=beta or 1.0)
    row = {name: float(value) for name, value in terms.items() if beta or name != "constant"}
    row["reward_var"] = float(groups.mean(rewards / freedom_N))
    row["residual_var"] = float(groups.mean(residuals / freedom_N))
    row["log_ratio/mean"], row["log_ratio/std"] = float(ratios_N.mean()), float(ratios_N.std(correction=0))
    row["log_ratio/max"] = float(ratios_N.abs().max())
    row["log_ratio/group_std"] = float((groups.sums(ratios) / groups.sizes_P).sqrt().mean())
    if beta and (total := float(rewards.sum())) > 0:
        row["r2"] = 1 - float(residuals.sum()) / total
    return row
