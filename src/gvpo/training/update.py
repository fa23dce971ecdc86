"""The exact gradient of a batch of groups, however it is split.

Where all groups of a batch fit one forward, the loss is taken there, with its graph. Where a group does not fit, pass 1
scores its members without a graph, the objective's gradient with respect to those log-probs is taken once, and pass 2
back-propagates it through each part. A mean over part of a group is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError, located, nearest
from gvpo.groups import Completion, Group
from gvpo.models.batches import Batch
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.scoring import (
    as_scorer,
    blank_scores,
    member_order,
    plan_scoring,
    score_batch,
    scored_mask,
    unwrapped,
)
from gvpo.objective import OBJECTIVES, Objective, gvpo_weights
from gvpo.training.processes import OneProcess, current_processes


def accumulate_gradients(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    beta: float,
    tokenizer: Any | None = None,
    token_budget: int | None = None,
    share_prefix: bool = True,
    objective: str = "gvpo",
    denominator: float | None = None,
) -> dict[str, Any]:
    """Add d loss / d theta of these groups to every parameter's .grad; gradients that are there stay.

    model: a Hugging Face causal model, a PEFT model, or a Scorer, bare or in DistributedDataParallel; its train or
        evaluation mode is left alone.
    groups: every member with a reward needs its ref_logprob (nats). A member whose reward is None leaves its group;
        groups left with fewer than two members contribute nothing.
    beta: strength of the pull towards the reference, in reward per nat, > 0 (0 where the objective allows it).
    tokenizer: needed where a group has text without token ids.
    token_budget: most token positions in one forward, prompt and padding included; None = no limit. Neither it nor
        share_prefix changes the gradient.
    objective: a name in gvpo.objective.OBJECTIVES, with its default settings. Objectives on tokens need every rewarded
        member's ref_token_logprobs and old_token_logprobs.
    denominator: number of groups to average over; default: those with two rewarded members or more in this call.
        Several processes pass the global count, divided by their number where a wrapper averages gradients.
    Returns dict(loss: float64 scalar, weights_N: GVPO's, float64, 0 where a member left; for beta 0 the centred
    rewards; logps_N: without a graph, groups: int, those with two rewarded members or more); N = all completions in
    order.
    Raises UserError naming group and member for a missing ref_logprob, or for what does not fit model or budget.
    Source: arXiv 2504.19599, Algorithm 1 and its empirical loss, times 1/2.
    """
    scorer = as_scorer(model)
    gradients = group_gradients(
        scorer,
        list(groups),
        beta=beta,
        tokenizer=tokenizer,
        token_budget=token_budget,
        share_prefix=share_prefix,
        objective=find_objective(objective),
        settings={},
        denominator=denominator,
        # Under a wrapper the processes exchange gradients, and must do so equally often.
        processes=current_processes() if unwrapped(scorer) is not scorer else None,
    )
    targets, logps_N = gradients.targets, gradients.logps_N
    return {
        "loss": gradients.loss,
        "weights_N": targets.weights(logps_N, beta),
        "logps_N": logps_N,
        "groups": targets.teaching_groups(),
    }


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a gradient was made of. loss: float64 scalar, this process's part; logps_N: without a graph."""

    loss: Tensor
    logps_N: Tensor
    targets: Targets

    @property
    def ref_logps_N(self) -> Tensor:
        """The reference log-probs that were used."""
        return self.logps_N if self.targets.ref_logps_N is None else self.targets.ref_logps_N


def group_gradients(
    scorer: nn.Module,
    groups: Sequence[Group],
    *,
    beta: float,
    tokenizer: Any | None,
    token_budget: int | None,
    share_prefix: bool,
    objective: Objective,
    settings: Mapping[str, Any],
    denominator: float | None,
    own_reference: bool = False,
    own_rollout: bool = False,
    processes: OneProcess | None = None,
) -> Gradients:
    """`accumulate_gradients` for a Scorer, bare or in a data-parallel wrapper, beside other processes or alone.

    settings: what the objective takes beside beta.
    own_reference: the reference is the policy itself at this very update; no ref_logprob is needed or used.
    own_rollout: so is the policy that drew the groups; no old_token_logprobs are needed or used.
    """
    encoded = encode_groups(groups, tokenizer)
    plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
    device = next(scorer.parameters()).device
    mask_NT = scored_mask(encoded).to(device) if objective.per_token else None
    targets = Targets.of(groups, device, mask_NT, own_reference=own_reference, own_rollout=own_rollout)
    if denominator is None:
        denominator = targets.teaching_groups()
    function = partial(objective.loss, beta=beta, denominator=denominator, **settings)

    def loss(logps: Tensor, places: Tensor) -> Tensor:
        return targets.loss(function, logps, places)

    width = None if mask_NT is None else mask_NT.shape[1]
    logps, total = _backpropagate(scorer, encoded, plan, loss, processes or OneProcess(), width)
    return Gradients(total, logps if width is None else logps.sum(1), targets)


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
        terms: dict[str, Any] = {"beta": beta} if beta > 0 else {"beta": 1.0, "components": ("reward",)}
        weights_N[kept] = gvpo_weights(
            logps_N[kept], refs_N[kept], self.rewards_N[kept], self.group_ids_N[kept], **terms
        )
        return weights_N


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


def find_objective(name: str) -> Objective:
    """The objective of that name. Raises UserError for an unknown one."""
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is unknown; {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def _backpropagate(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan: Sequence[Batch],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    processes: OneProcess,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    """Back-propagate the batches of a plan. Returns (logps_N without a graph, the loss).

    loss_of: from log-probs of whole groups, and their places among the N members, to a scalar.
    width: for objectives on tokens; log-probs are then (N, T) throughout.
    Every process runs as many forward and backward passes as the one with the most, so that collectives meet; a
    process that has run out runs an idle one. Gradients are exchanged once, in the last backward.
    """
    count = sum(len(group.completion_ids) for group in encoded)
    device = next(scorer.parameters()).device
    places = [member_order(encoded, [batch]).to(device) for batch in plan]
    logps_N = blank_scores(scorer, count, width)
    loss = torch.zeros((), dtype=torch.float64, device=device)

    # Pass 1: groups that are spread over several batches.
    parts = [number for number, batch in enumerate(plan) if not batch.whole]
    with torch.no_grad():
        for turn in range(processes.most(len(parts))):
            logps = score_batch(scorer, encoded, plan[parts[turn]] if turn < len(parts) else None, width=width)
            if turn < len(parts):
                logps_N[places[parts[turn]]] = logps
    gradient_N = torch.zeros_like(logps_N)
    if parts:
        split = torch.cat([places[number] for number in parts])
        leaf = logps_N[split].requires_grad_()
        split_loss = loss_of(leaf, split)
        (gradient_N[split],) = torch.autograd.grad(split_loss, leaf)
        loss += split_loss.detach()

    # Pass 2: every batch, with its graph.
    turns = processes.most(len(plan))
    for turn in range(turns):
        batch = plan[turn] if turn < len(plan) else None
        with nullcontext() if turn == turns - 1 else processes.no_sync(scorer):
            logps = score_batch(scorer, encoded, batch, width=width)
            if batch is None:
                (0.0 * logps.sum()).backward()
            elif batch.whole:
                logps_N[places[turn]] = logps.detach()
                batch_loss = loss_of(logps, places[turn])
                batch_loss.backward()
                loss += batch_loss.detach()
            else:
                (gradient_N[places[turn]] * logps).sum().backward()
    return logps_N, loss
