"""What log-probs are fitted to: the members' rewards, their reference, and what ratios are taken against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvpo.errors import UserError, located
from gvpo.groups import Completion, Group
from gvpo.objective import gvpo_weights


@dataclass(frozen=True, slots=True)
class Targets:
    """What the log-probs of N members are fitted to; kept_N is False where a member has no reward.

    ref_logps_N is None where the reference is the policy itself at this very update: the log-ratio is zero by
    construction, and the log-probs of the update are their own reference. tokens: for objectives on tokens alone.
    """

    rewards_N: Tensor
    ref_logps_N: Tensor | None
    group_ids_N: Tensor
    kept_N: Tensor
    tokens: TokenTargets | None

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        device: torch.device,
        mask_NT: Tensor | None,
        *,
        own_reference: bool = False,
        own_rollout: bool = False,
    ) -> Targets:
        """The targets of these groups, members end to end; mask_NT: which tokens are scored, for objectives on tokens.

        Raises UserError for a reward without what it is to be fitted with, and for what is not finite.
        """
        for number, group in enumerate(groups):
            for place, member in enumerate(group.completions):
                with located(f"group {number}, member {place}"):
                    _check_member(member, own_reference=own_reference)
        members = [member for group in groups for member in group.completions]
        ids = [number for number, group in enumerate(groups) for _ in group.completions]

        def numbers(name: str) -> Tensor:
            values = [getattr(member, name) for member in members]
            return torch.tensor([value or 0.0 for value in values], dtype=torch.float64, device=device)

        kept_N = torch.tensor([member.reward is not None for member in members], dtype=torch.bool, device=device)
        refs_N = None if own_reference else numbers("ref_logprob")
        tokens = None
        if mask_NT is not None:
            refs_NT = None if own_reference else _token_logprobs(groups, "ref_token_logprobs", mask_NT)
            old_NT = None if own_rollout else _token_logprobs(groups, "old_token_logprobs", mask_NT)
            tokens = TokenTargets(mask_NT, refs_NT, old_NT)
        ids_N = torch.tensor(ids, dtype=torch.long, device=device)
        return cls(numbers("reward"), refs_N, ids_N, kept_N, tokens)

    @property
    def on_policy(self) -> bool:
        """Whether every log-ratio is zero by construction."""
        return self.ref_logps_N is None and (self.tokens is None or self.tokens.old_NT is None)

    def teaching_groups(self) -> int:
        """Groups with two rewarded members or more."""
        return int((self.group_ids_N[self.kept_N].bincount() >= 2).sum())

    def loss(self, function: Callable[..., Tensor], logps: Tensor, places: Tensor) -> Tensor:
        """The objective of the members at `places`, whole groups; logps: (N,), or (N, T) for one on tokens."""
        kept = self.kept_N[places]
        logps, places = logps[kept], places[kept]
        if self.tokens is None:
            given = (_or_own(self.ref_logps_N, logps, places),)
        else:
            old, ref = (_or_own(values, logps, places) for values in (self.tokens.old_NT, self.tokens.ref_NT))
            given = (old, ref, self.tokens.mask_NT[places])
        return function(logps, *given, self.rewards_N[places], self.group_ids_N[places])

    def weights(self, logps_N: Tensor, beta: float) -> Tensor:
        """GVPO's weight of every member, 0 where it left its group."""
        kept, weights_N = self.kept_N, torch.zeros_like(logps_N, dtype=torch.float64)
        refs_N = logps_N if self.ref_logps_N is None else self.ref_logps_N
        weights_N[kept] = member_weights(
            logps_N[kept], refs_N[kept], self.rewards_N[kept], self.group_ids_N[kept], beta
        )
        return weights_N


def member_weights(logps_N: Tensor, refs_N: Tensor, rewards_N: Tensor, group_ids_N: Tensor, beta: float) -> Tensor:
    """GVPO's weights, float64; the centred rewards where beta is 0."""
    terms: dict[str, Any] = {"beta": beta} if beta > 0 else {"beta": 1.0, "components": ("reward",)}
    return gvpo_weights(logps_N, refs_N, rewards_N, group_ids_N, **terms)


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """What objectives on tokens need: which tokens are scored, and their log-probs under the reference and under the
    policy that drew them; None where that is the policy itself at this very update."""

    mask_NT: Tensor
    ref_NT: Tensor | None
    old_NT: Tensor | None


def _or_own(values: Tensor | None, logps: Tensor, places: Tensor) -> Tensor:
    return logps.detach() if values is None else values[places]


def _check_member(member: Completion, *, own_reference: bool) -> None:
    if member.reward is not None and member.ref_logprob is None and not own_reference:
        raise UserError("a reward without a ref_logprob; score it under the reference first (sequence_logprobs)")
    for name, value in (("reward", member.reward), ("ref_logprob", member.ref_logprob)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"its {name} is {value}; give a finite number or None")


def _token_logprobs(groups: Sequence[Group], name: str, mask_NT: Tensor) -> Tensor:
    """The completions' log-probs of that name as a matrix of the mask's shape. Raises UserError where one has none."""
    rows: list[list[float]] = []
    for number, group in enumerate(groups):
        for place, member in enumerate(group.completions):
            values = getattr(member, name)
            with located(f"group {number}, member {place}"):
                _check_token_logprobs(member, name, values)
            rows.append((values or []) + [0.0] * (mask_NT.shape[1] - len(values or [])))
    return torch.tensor(rows, dtype=torch.float64, device=mask_NT.device).view(mask_NT.shape)


def _check_token_logprobs(member: Completion, name: str, values: list[float] | None) -> None:
    if values is None:
        if member.reward is not None:
            raise UserError(f"a reward without {name}; this objective needs them")
        return
    if len(values) != len(member.token_ids or []):
        raise UserError(f"{len(values)} {name} for {len(member.token_ids or [])} token_ids; give each token one")
    if not all(map(math.isfinite, values)):
        raise UserError(f"its {name} are not all finite; give finite numbers or None")
