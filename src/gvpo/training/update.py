"""The exact gradient of a batch of groups, however it is split.

Where all groups of a batch fit one forward, the loss is taken there, with its graph. Where a group does not fit, pass 1
scores its members without a graph, the objective's gradient with respect to those log-probs is taken once, and pass 2
back-propagates it through each part. A mean over part of a group is never formed.

Where log-ratios are zero by construction, the gradient with respect to the log-probs is known before any of them:
nothing is scored twice, and groups for which it is zero are not scored at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError, nearest
from gvpo.groups import Group
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
from gvpo.objective import OBJECTIVES, Objective
from gvpo.training.processes import OneProcess, current_processes
from gvpo.training.targets import Targets

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Log-probs of whole groups, (N,) or (N, T), and their places among all members, to a scalar."""


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
    device = next(scorer.parameters()).device
    mask_NT = scored_mask(encoded).to(device) if objective.per_token else None
    targets = Targets.of(groups, device, mask_NT, own_reference=own_reference, own_rollout=own_rollout)
    if denominator is None:
        denominator = targets.teaching_groups()
    function = partial(objective.loss, beta=beta, denominator=denominator, **settings)

    def loss(logps: Tensor, places: Tensor) -> Tensor:
        return targets.loss(function, logps, places)

    width = None if mask_NT is None else mask_NT.shape[1]

    def plan_of(chosen: Sequence[EncodedGroup]) -> list[Batch]:
        return plan_scoring(scorer, chosen, token_budget, share_prefix)

    back = _backpropagate_known if targets.on_policy and objective.of_ratios else _backpropagate
    logps, total = back(scorer, encoded, plan_of, loss, processes or OneProcess(), width)
    return Gradients(total, logps if width is None else logps.sum(1), targets)


def find_objective(name: str) -> Objective:
    """The objective of that name. Raises UserError for an unknown one."""
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is unknown; {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def _backpropagate(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan_of: Callable[[Sequence[EncodedGroup]], list[Batch]],
    loss_of: LossOf,
    processes: OneProcess,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    """Back-propagate groups. Returns (logps_N without a graph, the loss).

    plan_of: groups to batches. loss_of: see LossOf.
    width: for objectives on tokens; log-probs are then (N, T) throughout.
    """
    plan = plan_of(encoded)
    # Pass 1: groups that are spread over several batches.
    parts = [batch for batch in plan if not batch.whole]
    with torch.no_grad():
        pieces = [
            score_batch(scorer, encoded, parts[turn] if turn < len(parts) else None, width=width)
            for turn in range(processes.most(len(parts)))
        ]
    gradient_N = blank_scores(scorer, sum(len(group.completion_ids) for group in encoded), width)
    losses: list[Tensor] = []
    if parts:
        split = member_order(encoded, parts).to(gradient_N.device)
        leaf = torch.cat(pieces[: len(parts)]).requires_grad_()
        losses.append(loss_of(leaf, split))
        (gradient_N[split],) = torch.autograd.grad(losses[0], leaf)

    # Pass 2: every batch, with its graph.
    def loss_of_batch(batch: Batch, places: Tensor, logps: Tensor) -> Tensor:
        if not batch.whole:
            return (gradient_N[places] * logps).sum()
        losses.append(loss_of(logps, places))
        return losses[-1]

    logps_N = _backpropagate_batches(scorer, encoded, plan, loss_of_batch, processes.most(len(plan)), processes, width)
    loss = torch.zeros((), dtype=torch.float64, device=logps_N.device)
    return logps_N, sum((one.detach() for one in losses), loss)


def _backpropagate_known(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan_of: Callable[[Sequence[EncodedGroup]], list[Batch]],
    loss_of: LossOf,
    processes: OneProcess,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    """Back-propagate groups whose log-ratios are zero whatever their log-probs. Returns as `_backpropagate` does.

    Groups without a gradient, as where all rewards are equal, are not scored: their log-probs are returned as 0.
    """
    sizes = [len(group.completion_ids) for group in encoded]
    leaf = blank_scores(scorer, sum(sizes), width).requires_grad_()
    everyone = torch.arange(len(leaf), device=leaf.device)
    gradient_N = torch.autograd.grad(loss_of(leaf, everyone), leaf)[0] if sizes else leaf
    taught = [bool(part.any()) for part in gradient_N.split(sizes)] if sizes else []
    places = [part for part, has in zip(everyone.split(sizes), taught, strict=True) if has] if sizes else []
    chosen = [group for group, has in zip(encoded, taught, strict=True) if has]
    weights = gradient_N[torch.cat(places)] if places else gradient_N[:0]

    def loss_of_batch(batch: Batch, places: Tensor, logps: Tensor) -> Tensor:
        return (weights[places] * logps).sum()

    plan = plan_of(chosen)
    # Where there are groups, there is a gradient, be it zero: moments decay then, and without one they would not.
    turns = max(processes.most(len(plan)), min(processes.total(len(encoded)), 1))
    scores = _backpropagate_batches(scorer, chosen, plan, loss_of_batch, turns, processes, width)
    logps_N = leaf.detach()
    if places:
        logps_N[torch.cat(places)] = scores
    loss = loss_of(logps_N, everyone) if sizes else torch.zeros((), dtype=torch.float64, device=leaf.device)
    return logps_N, loss


def _backpropagate_batches(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan: Sequence[Batch],
    loss_of_batch: Callable[[Batch, Tensor, Tensor], Tensor],
    turns: int,
    processes: OneProcess,
    width: int | None,
) -> Tensor:
    """Score and back-propagate batch by batch. Returns the logps_N, without a graph.

    loss_of_batch: from a batch, its members' places and log-probs to a scalar.
    turns: as many passes as the process with the most batches makes, so that collectives meet; one that has run out
    runs idle ones. Gradients are exchanged once, in the last backward.
    """
    logps_N = blank_scores(scorer, sum(len(group.completion_ids) for group in encoded), width)
    for turn in range(turns):
        batch = plan[turn] if turn < len(plan) else None
        syncing = nullcontext() if turn == turns - 1 else processes.no_sync(scorer)
        with syncing, unwrapped(scorer).attending(batch):
            logps = score_batch(scorer, encoded, batch, width=width)
            if batch is None:
                (0.0 * logps.sum()).backward()
                continue
            places = member_order(encoded, [batch]).to(logps.device)
            logps_N[places] = logps.detach()
            loss_of_batch(batch, places, logps).backward()
    return logps_N
