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

import math
from collections.abc import Collection
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

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
    logps_N, ref_logps_N, rewards_N, groups = _prepare(logps_N, ref_logps_N, rewards_N, group_ids_N, beta)
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
    logps_N, ref_logps_N, rewards_N, groups = _prepare(logps_N, ref_logps_N, rewards_N, group_ids_N, beta)
    if denominator is not None:
        _check_denominator(denominator, groups.teaching())
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
    logps_N, ref_logps_N, rewards_N, groups = _prepare(logps_N, ref_logps_N, rewards_N, group_ids_N, beta)
    l_N, r_N, R_N = groups.centre(logps_N), groups.centre(ref_logps_N), groups.centre(rewards_N)
    target_N = R_N + beta * r_N
    return {
        "reward_cov": groups.mean_covariance(l_N, R_N),
        "ref_cov": groups.mean_covariance(l_N, r_N),
        "var": groups.mean_covariance(l_N, l_N),
        "constant": groups.mean_covariance(target_N, target_N) / 2,
    }


class _Groups(NamedTuple):
    """Who belongs with whom, from the ids alone."""

    index_N: Tensor  # the group of each member, in 0..P-1
    sizes_P: Tensor  # k of each group

    @classmethod
    def from_ids(cls, group_ids_N: Tensor) -> _Groups:
        _, index_N, sizes_P = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
        return cls(index_N, sizes_P)

    def centre(self, values_N: Tensor) -> Tensor:
        """Each value less the mean of its group."""
        # A lone member is its own mean, whatever it is: infinite too.
        values_N = torch.where(self.sizes_P[self.index_N] == 1, 0.0, values_N)
        # Less one of its values first: a group of equal values is then centred to exact zeros. Rounding errors in their
        # place (1e-17) would be back-propagated as denormal numbers, at a fiftieth of the speed.
        shift_P = values_N.new_full(self.sizes_P.shape, math.inf).scatter_reduce(
            0, self.index_N, values_N.detach(), "amin"
        )
        values_N = values_N - shift_P[self.index_N]
        sums_P = values_N.new_zeros(self.sizes_P.shape).index_add(0, self.index_N, values_N)
        return values_N - (sums_P / self.sizes_P)[self.index_N]

    def teaching(self) -> int:
        """How many groups have k >= 2."""
        return int((self.sizes_P >= 2).sum())

    def mean_covariance(self, a_N: Tensor, b_N: Tensor, denominator: float | None = None) -> Tensor:
        """Bessel-corrected covariance of centred values in each group with k >= 2, averaged over those groups."""
        denominator = self.teaching() if denominator is None else denominator
        # A lone member is its own mean: its products are 0, and 1 stands in for k - 1. So with no group of k >= 2 the
        # sum is 0 with its graph intact, and 1 stands in for the denominator.
        degrees_N = (self.sizes_P - 1).clamp(min=1)[self.index_N]
        return (a_N * b_N / degrees_N).sum() / (denominator or 1)


def _prepare(
    logps_N: Tensor, ref_logps_N: Tensor, rewards_N: Tensor, group_ids_N: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, _Groups]:
    """The checked arguments in float64, reference and rewards cut from any graph, and the groups."""
    _check_logps("logps_N", logps_N)
    _check_logps("ref_logps_N", ref_logps_N)
    _check_rewards(rewards_N)
    _check_group_ids(group_ids_N)
    members = {"logps_N": logps_N, "ref_logps_N": ref_logps_N, "rewards_N": rewards_N, "group_ids_N": group_ids_N}
    for name, values in members.items():
        _check_alike(name, values, logps_N)
    if not _real("beta", beta) > 0:
        raise ValueError(f"beta must be greater than 0, got {beta}")
    groups = _Groups.from_ids(group_ids_N)
    return logps_N.double(), ref_logps_N.detach().double(), rewards_N.detach().double(), groups


def _check_logps(name: str, values: Tensor) -> None:
    _check_tensor(name, values)
    if values.dtype in (torch.float32, torch.float64):
        return
    if values.is_floating_point():
        # Sums reach hundreds of nats, where bfloat16 steps by whole nats: casting the sum does not help.
        advice = "cast the model output to float32 before summing over the tokens"
    else:
        advice = "log-probabilities are float32 or float64"
    raise TypeError(f"{name} is {values.dtype}: {advice}")


def _check_rewards(rewards_N: Tensor) -> None:
    _check_tensor("rewards_N", rewards_N)
    dtype = rewards_N.dtype
    if dtype not in (torch.float32, torch.float64) and (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f"rewards_N is {dtype}: rewards are float32, float64, integer or bool; make them so at the source"
        )


def _check_group_ids(group_ids_N: Tensor) -> None:
    _check_tensor("group_ids_N", group_ids_N)
    dtype = group_ids_N.dtype
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise TypeError(f"group_ids_N is {dtype}: group ids are integers, the same number for the members of a group")


def _check_tensor(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")


def _check_alike(name: str, values: Tensor, logps_N: Tensor) -> None:
    if values.ndim != 1:
        raise ValueError(f"{name} must have rank 1, one number for each completion, got shape {tuple(values.shape)}")
    if len(values) != len(logps_N):
        raise ValueError(f"{name} has {len(values)} members and logps_N has {len(logps_N)}: give each completion one")
    if values.device != logps_N.device:
        raise ValueError(f"{name} is on {values.device} and logps_N on {logps_N.device}: move them to one device")


def _check_components(components: Collection[str]) -> None:
    allowed = f"a non-empty subset of {_COMPONENTS}"
    if isinstance(components, str):
        raise ValueError(f"components must be {allowed}, got a bare string: write ({components!r},)")
    unknown = [name for name in components if name not in _COMPONENTS]
    if unknown:
        raise ValueError(f"components must be {allowed}, got the unknown {unknown[0]!r}")
    if not components:
        raise ValueError(f"components must be {allowed}, got none")


def _check_denominator(denominator: float, teaching: int) -> None:
    if _real("denominator", denominator) < 0:
        raise ValueError(f"denominator must not be negative, got {denominator}")
    if denominator == 0 and teaching > 0:
        raise ValueError(f"denominator is 0 with {teaching} group(s) of two or more: pass the whole batch's count")


def _real(name: str, value: float) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
