"""The exact gradient of a batch of groups, however it is split.

Where all groups of a batch fit one forward, the loss is taken there, with its graph. Where a group does not fit, pass 1
scores its members without a graph, the objective's gradient with respect to those log-probs is taken once, and pass 2
back-propagates it through each part. A mean over part of a group is never formed.
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
