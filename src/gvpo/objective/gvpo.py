"""Group Variance Policy Optimization: implicit rewards regressed onto rewards, both centred over the group.

For the k members of a group write l_i for the log-prob, r_i for the reference log-prob, R_i for the reward, and a bar
for the mean over the group. The implicit reward is beta (l_i - r_i), up to a constant of the prompt that centring
cancels. The loss is

    mean over groups with k >= 2 of  1/(2(k-1)) sum_i [beta ((l_i - r_i) - mean(l - r)) - (R_i - Rbar)]^2

and its gradient is that of a weighted likelihood, averaged over the same groups:

    -(beta/(k-1)) sum_i w_i grad l_i,   w_i = (R_i - Rbar) - beta ((l_i - r_i) - mean(l - r)),   sum_i w_i = 0.

Source: arXiv 2504.19599, the empirical loss of Algorithm 1. The Bessel factor 1/(k-1) makes it an unbiased estimate,
for any k >= 2, of half the variance of (implicit reward - reward) under the distribution that the group was drawn from.
The scale is half the paper's, so that the gradient has no factor 2.

Covered: ragged groups, members in any order, ids of any value, data from any source; float64 inside, whatever comes in.
Not covered: which members belong in a group, and non-finite values (NaN in, NaN out).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from gvpo.objective.members import check_real, members

_COMPONENTS = ("reward", "covariance", "variance")


def gvpo_weights(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    components: Collection[str] = _COMPONENTS,
) -> Tensor:
    """The weight of every completion: w_i = (R_i - Rbar) + beta (r_i - rbar) - beta (l_i - lbar).

    Arguments are those of `gvpo_loss`. `components` names the terms that are kept, in the order above: "reward",
    "covariance", "variance"; all three are GVPO, fewer an ablation ("reward" alone is a mean-baseline REINFORCE).

    Returns weights_N, float64, without a graph. They sum to zero in each group; a group of one has weight exactly 0.
    `-(beta/(k-1)) sum_i w_i l_i`, averaged over groups with k >= 2, has the gradient of `gvpo_loss`.

    Raises ValueError for components that are empty or unknown, else what `gvpo_loss` raises.
    Source: arXiv 2504.19599, the weight of the NLL form; the switches are those of its ablation.
    """
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N)
    beta = check_real("beta", beta, above=0)
    _check_components(components)
    reward, covariance, variance = (float(name in components) for name in _COMPONENTS)
    # One centring of the sum, not a sum of three: log-ratios of zero then give the centred rewards to the bit.
    return groups.centre(reward * rewards_N + beta * (covariance * ref_logps_N - variance * logps_N.detach()))


def gvpo_loss(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    denominator: float | None = None,
) -> Tensor:
    """Half the squared error between centred implicit rewards and centred rewards, averaged over groups.

    logps_N, ref_logps_N: nats, summed over the completion's tokens; float32 or float64. Only logps_N gets a gradient.
    rewards_N: float32, float64, integer or bool.
    group_ids_N: any integers; equal ids make a group, wherever they stand.
    beta: strength of the pull towards the reference, in reward per nat; finite, > 0.
    denominator: number of groups to average over; default: those with k >= 2 here. Who splits a batch (in whole groups)
    over micro-batches or processes passes the count of the whole batch, and sums. 0 is allowed if no group has k >= 2.

    Returns a float64 scalar. With no group of k >= 2 (N = 0 included) it is 0 and still carries a graph to logps_N.

    Raises TypeError for a dtype or type not listed (half precision above all), ValueError for a rank other than 1,
    unequal lengths, different devices, or a beta or denominator out of range.
    Source: arXiv 2504.19599, the empirical loss of Algorithm 1 (MSE form), times 1/2.
    """
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N, denominator)
    beta = check_real("beta", beta, above=0)
    implicit_rewards_N = beta * (logps_N - ref_logps_N)
    residuals_N = groups.centre(implicit_rewards_N) - groups.centre(rewards_N)
    return groups.mean_covariance(residuals_N, residuals_N, denominator) / 2


def gvpo_components(
    logps_N: Tensor,
    ref_logps_N: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
) -> dict[str, Tensor]:
    """The terms of the loss: `loss = -beta*reward_cov - beta^2*ref_cov + beta^2/2*var + constant`.

    Arguments and errors are those of `gvpo_loss`. Returns float64 scalars, Bessel-corrected moments averaged over the
    groups with k >= 2 (0 if there is none): reward_cov = Cov(l, R) raises the better completions, ref_cov = Cov(l, r)
    keeps the policy near its reference, var = Var(l) keeps it spread; these three carry a graph to logps_N.
    constant = 1/2 Var(R + beta r) carries none. For log-probs far apart the terms are huge and cancel: take the loss
    from `gvpo_loss`, and the terms for what they say.
    Source: arXiv 2504.19599, the RL form, with beta written out.
    """
    logps_N, ref_logps_N, rewards_N, groups = members(logps_N, ref_logps_N, rewards_N, group_ids_N)
    beta = check_real("beta", beta, above=0)
    l_N, r_N, R_N = groups.centre(logps_N), groups.centre(ref_logps_N), groups.centre(rewards_N)
    target_N = R_N + beta * r_N
    return {
        "reward_cov": groups.mean_covariance(l_N, R_N),
        "ref_cov": groups.mean_covariance(l_N, r_N),
        "var": groups.mean_covariance(l_N, l_N),
        "constant": groups.mean_covariance(target_N, target_N) / 2,
    }


def _check_components(components: Collection[str]) -> None:
    allowed = f"a non-empty subset of {_COMPONENTS}"
    if isinstance(components, str):
        raise ValueError(f"components must be {allowed}, got a bare string: write ({components!r},)")
    unknown = [name for name in components if name not in _COMPONENTS]
    if unknown:
        raise ValueError(f"components must be {allowed}, got the unknown {unknown[0]!r}")
    if not components:
        raise ValueError(f"components must be {allowed}, got none")
