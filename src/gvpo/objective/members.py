"""What every objective is given: log-probs, rewards, and who belongs with whom; checked, in float64.

Group identity is data. Nothing here infers a group from a position or a fixed size.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Who belongs with whom, from the ids alone."""

    index_N: Tensor  # the group of each member, in 0..P-1
    sizes_P: Tensor  # k of each group

    @classmethod
    def from_ids(cls, group_ids_N: Tensor) -> Groups:
        """The groups that equal ids make."""
        _, index_N, sizes_P = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
        return cls(index_N, sizes_P)

    @property
    def sizes_N(self) -> Tensor:
        """k of the group of each member."""
        return self.sizes_P[self.index_N]

    def centre(self, values_N: Tensor) -> Tensor:
        """Each value less the mean of its group."""
        # Less one of its values first: a group of equal values is then centred to exact zeros. Rounding errors in their
        # place (1e-17) would be back-propagated as denormal numbers, at a fiftieth of the speed.
        shift_P = values_N.new_full(self.sizes_P.shape, math.inf).scatter_reduce(
            0, self.index_N, values_N.detach(), "amin"
        )
        values_N = values_N - shift_P[self.index_N]
        return values_N - (self.sums(values_N) / self.sizes_P)[self.index_N]

    def sums(self, values_N: Tensor) -> Tensor:
        """The sum over each group, (P,)."""
        return values_N.new_zeros(self.sizes_P.shape).index_add(0, self.index_N, values_N)

    def teaching(self) -> int:
        """How many groups have k >= 2."""
        return int((self.sizes_P >= 2).sum())

    def mean_covariance(self, a_N: Tensor, b_N: Tensor, denominator: float | None = None) -> Tensor:
        """Bessel-corrected covariance of centred values in each group with k >= 2, averaged over those groups."""
        # A lone member is its own mean: its products are 0, and 1 stands in for k - 1.
        return self.mean((a_N * b_N) / (self.sizes_N - 1).clamp(min=1), denominator)

    def mean(self, values_N: Tensor, denominator: float | None = None) -> Tensor:
        """The sum of the values of the groups with k >= 2, divided by their number or by `denominator`."""
        # Zero, not absent: with no group of k >= 2 the sum is 0 with its graph intact.
        return self.average(torch.where(self.sizes_N >= 2, values_N, 0.0).sum(), denominator)

    def average(self, total: Tensor, denominator: float | None = None) -> Tensor:
        """A total over the groups with k >= 2, divided by their number or by `denominator`; 1 stands in for 0."""
        return total / ((self.teaching() if denominator is None else denominator) or 1)


class Members(NamedTuple):
    """N completions as an objective on sequences sees them: float64, only logps_N with a graph."""

    logps_N: Tensor
    ref_logps_N: Tensor
    rewards_N: Tensor
    groups: Groups


class TokenMembers(NamedTuple):
    """N completions of at most T tokens as an objective on tokens sees them: float64, only logps_NT with a graph.

    Places where mask_NT is False, and lone members, hold 0 in all three: no ratio and no sum sees them.
    """

    logps_NT: Tensor
    old_logps_NT: Tensor
    ref_logps_NT: Tensor
    mask_NT: Tensor
    rewards_N: Tensor
    groups: Groups


def members(
    logps_N: Tensor, ref_logps_N: Tensor, rewards_N: Tensor, group_ids_N: Tensor, denominator: float | None = None
) -> Members:
    """The checked arguments in float64, reference and rewards cut from any graph, and the groups.

    Raises TypeError and ValueError as `gvpo_loss` documents.
    """
    _check_logps("logps_N", logps_N)
    _check_logps("ref_logps_N", ref_logps_N)
    _check_rewards(rewards_N)
    _check_group_ids(group_ids_N)
    given = {"logps_N": logps_N, "ref_logps_N": ref_logps_N, "rewards_N": rewards_N, "group_ids_N": group_ids_N}
    for name, values in given.items():
        _check_alike(name, values, logps_N)
    groups = Groups.from_ids(group_ids_N)
    _check_denominator(denominator, groups)
    # A lone member contributes nothing, whatever it holds: infinity and NaN too.
    logps_N, ref_logps_N, rewards_N = (
        torch.where(groups.sizes_N == 1, 0.0, values.double())
        for values in (logps_N, ref_logps_N.detach(), rewards_N.detach())
    )
    return Members(logps_N, ref_logps_N, rewards_N, groups)


def token_members(
    logps_NT: Tensor,
    old_logps_NT: Tensor,
    ref_logps_NT: Tensor,
    mask_NT: Tensor,
    rewards_N: Tensor,
    group_ids_N: Tensor,
    denominator: float | None = None,
) -> TokenMembers:
    """The same for log-probs token by token.

    Raises TypeError for a dtype not listed (half precision above all; a mask that is not bool), ValueError for shapes
    that do not fit each other.
    """
    matrices = {"logps_NT": logps_NT, "old_logps_NT": old_logps_NT, "ref_logps_NT": ref_logps_NT}
    for name, values in matrices.items():
        _check_logps(name, values)
    _check_tensor("mask_NT", mask_NT)
    if mask_NT.dtype != torch.bool:
        raise TypeError(f"mask_NT is {mask_NT.dtype}: give bool, True where a token is scored")
    if logps_NT.ndim != 2:
        raise ValueError(f"logps_NT must have rank 2, completions by tokens, got shape {tuple(logps_NT.shape)}")
    for name, values in (matrices | {"mask_NT": mask_NT}).items():
        if values.shape != logps_NT.shape or values.device != logps_NT.device:
            raise ValueError(
                f"{name} is {tuple(values.shape)} on {values.device} and logps_NT {tuple(logps_NT.shape)} on "
                f"{logps_NT.device}: give all of one shape and device"
            )
    # Any column of the right length: what is checked here is rewards and ids, and who stands alone.
    sums = members(logps_NT.detach().sum(1), ref_logps_NT.detach().sum(1), rewards_N, group_ids_N, denominator)
    # Not times the mask: padding may hold anything, infinity too.
    seen_NT = mask_NT & (sums.groups.sizes_N >= 2)[:, None]
    logps, old, ref = (torch.where(seen_NT, values.double(), 0.0) for values in matrices.values())
    return TokenMembers(logps, old.detach(), ref.detach(), mask_NT, sums.rewards_N, sums.groups)


def check_real(name: str, value: float, *, above: float | None = None, least: float | None = None) -> float:
    """The value, if it is a finite number in its range. Raises TypeError or ValueError naming it."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must not be less than {least}, got {value}")
    return float(value)


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


def _check_denominator(denominator: float | None, groups: Groups) -> None:
    if denominator is None:
        return
    check_real("denominator", denominator)
    if denominator < 0:
        raise ValueError(f"denominator must not be negative, got {denominator}")
    if denominator == 0 and (teaching := groups.teaching()) > 0:
        raise ValueError(f"denominator is 0 with {teaching} group(s) of two or more: pass the whole batch's count")
