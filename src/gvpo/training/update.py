"""The exact gradient of a batch of groups, however it is split.

Where all groups of a batch fit one forward, the loss is taken there, with its graph. Where a group does not fit, pass 1
scores its members without a graph, the objective's gradient with respect to those log-probs is taken once, and pass 2
back-propagates it through each part. A mean over part of a group is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.batches import Batch, plan_batches
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.scoring import as_scorer, member_order, plan_scoring, score_batch
from gvpo.objective import OBJECTIVES, gvpo_weights

Objective = Callable[..., Tensor]

_IDLE = [EncodedGroup([0], [[0]], [None])]
_IDLE_BATCH = plan_batches(_IDLE, None, share_prefix=False)[0]


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

    model: a Hugging Face causal model, a PEFT model, or a Scorer; its train or evaluation mode is left alone. groups:
    every member with a reward needs its ref_logprob (nats); a member whose reward is None leaves its group, and groups
    left with fewer than two members contribute nothing. beta: > 0. token_budget: most token positions in one forward,
    None = no limit; neither it nor share_prefix changes the gradient. denominator: number of groups to average over,
    default those with two rewarded members or more in this call; several processes pass the global count and undo
    data-parallel averaging.
    Returns dict(loss: float64 scalar, weights_N: float64, 0 where a member left, logps_N: without a graph,
    groups: int, those with k >= 2), N = all completions in order.
    Raises UserError naming group and member for a missing ref_logprob, or what does not fit model or budget.
    Source: arXiv 2504.19599, Algorithm 1 and its empirical loss, times 1/2.
    """
    scorer = as_scorer(model)
    encoded = encode_groups(groups, tokenizer)
    plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
    targets = Targets.of(groups, next(scorer.parameters()).device)
    teaching = targets.teaching_groups()
    if denominator is None:
        denominator = teaching
    logps_N, loss = backpropagate(scorer, encoded, plan, targets, find_objective(objective), beta, denominator)
    return {"loss": loss, "weights_N": targets.weights(logps_N, beta), "logps_N": logps_N, "groups": teaching}


@dataclass(frozen=True, slots=True)
class Targets:
    """What the log-probs of N members are fitted to; kept_N is False where a member has no reward.

    ref_logps_N is None where the reference is the policy itself at this very update: the log-ratio is zero by
    construction, and the log-probs of the update are their own reference.
    """

    rewards_N: Tensor
    ref_logps_N: Tensor | None
    group_ids_N: Tensor
    kept_N: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device, *, own_reference: bool = False) -> Targets:
        """The targets of these groups, members end to end. Raises UserError for a reward without a ref_logprob."""
        rewards, refs, ids = [], [], []
        for number, group in enumerate(groups):
            for place, member in enumerate(group.completions):
                if member.reward is not None and member.ref_logprob is None and not own_reference:
                    raise UserError(
                        f"group {number}, member {place}: a reward without a ref_logprob; "
                        "score it under the reference first (sequence_logprobs)"
                    )
                rewards.append(float("nan") if member.reward is None else member.reward)
                refs.append(0.0 if member.ref_logprob is None else member.ref_logprob)
                ids.append(number)
        rewards_N = torch.tensor(rewards, dtype=torch.float64, device=device)
        refs_N = None if own_reference else torch.tensor(refs, dtype=torch.float64, device=device)
        return cls(rewards_N, refs_N, torch.tensor(ids, dtype=torch.long, device=device), ~rewards_N.isnan())

    def teaching_groups(self) -> int:
        """Groups with two rewarded members or more."""
        return int((self.group_ids_N[self.kept_N].bincount() >= 2).sum())

    def loss(
        self, logps: Tensor, places: Tensor, objective: Objective, beta: float, denominator: float | None
    ) -> Tensor:
        """The objective of the members at `places`, whole groups."""
        kept = self.kept_N[places]
        logps, places = logps[kept], places[kept]
        refs = logps.detach() if self.ref_logps_N is None else self.ref_logps_N[places]
        ids = self.group_ids_N[places]
        return objective(logps, refs, self.rewards_N[places], ids, beta=beta, denominator=denominator)

    def weights(self, logps_N: Tensor, beta: float) -> Tensor:
        """GVPO's weight of every member, 0 where it left its group."""
        kept, weights_N = self.kept_N, torch.zeros_like(logps_N, dtype=torch.float64)
        refs_N = logps_N if self.ref_logps_N is None else self.ref_logps_N
        weights_N[kept] = gvpo_weights(
            logps_N[kept], refs_N[kept], self.rewards_N[kept], self.group_ids_N[kept], beta=beta
        )
        return weights_N


class OneProcess:
    """How processes keep in step; with one there is nothing to do. `Processes` is the same over accelerate."""

    def most(self, count: int) -> int:
        """The largest count over all processes."""
        return count

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A block whose backward passes do not exchange gradients yet."""
        return nullcontext()


def backpropagate(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan: Sequence[Batch],
    targets: Targets,
    objective: Objective,
    beta: float,
    denominator: float,
    processes: OneProcess | None = None,
) -> tuple[Tensor, Tensor]:
    """Back-propagate the batches of a plan. Returns (logps_N without a graph, the loss).

    Every process runs as many forward and backward passes as the one with the most, so that collectives meet; a
    process that has run out runs an empty one. Gradients are exchanged once, in the last backward.
    """
    processes = processes or OneProcess()
    device = targets.rewards_N.device
    places = [member_order(encoded, [batch]).to(device) for batch in plan]
    logps_N = torch.zeros(len(targets.rewards_N), dtype=_score_dtype(scorer), device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)

    # Pass 1: groups that are spread over several batches.
    parts = [number for number, batch in enumerate(plan) if not batch.whole]
    with torch.no_grad():
        for turn in range(processes.most(len(parts))):
            logps = score_pass(scorer, encoded, plan[parts[turn]] if turn < len(parts) else None)
            if turn < len(parts):
                logps_N[places[parts[turn]]] = logps
    gradient_N = torch.zeros_like(logps_N)
    if parts:
        split = torch.cat([places[number] for number in parts])
        leaf = logps_N[split].requires_grad_()
        split_loss = targets.loss(leaf, split, objective, beta, denominator)
        (gradient_N[split],) = torch.autograd.grad(split_loss, leaf)
        loss += split_loss.detach()

    # Pass 2: every batch, with its graph.
    turns = processes.most(len(plan))
    for turn in range(turns):
        batch = plan[turn] if turn < len(plan) else None
        with nullcontext() if turn == turns - 1 else processes.no_sync(scorer):
            logps = score_pass(scorer, encoded, batch)
            if batch is None:
                (0.0 * logps.sum()).backward()
            elif batch.whole:
                logps_N[places[turn]] = logps.detach()
                batch_loss = targets.loss(logps, places[turn], objective, beta, denominator)
                batch_loss.backward()
                loss += batch_loss.detach()
            else:
                (gradient_N[places[turn]] * logps).sum().backward()
    return logps_N, loss


def _score_dtype(scorer: nn.Module) -> torch.dtype:
    return torch.promote_types(next(scorer.parameters()).dtype, torch.float32)


def score_pass(scorer: nn.Module, encoded: Sequence[EncodedGroup], batch: Batch | None) -> Tensor:
    """Log-probs of a batch's members; None is the empty pass of a process that has run out of batches."""
    device = next(scorer.parameters()).device
    return (
        score_batch(scorer, _IDLE, _IDLE_BATCH, device)
        if batch is None
        else score_batch(scorer, encoded, batch, device)
    )


def find_objective(name: str) -> Objective:
    """The objective of that name. Raises UserError for an unknown one."""
    if name not in OBJECTIVES:
        raise UserError(f"objective {name!r} is unknown; there is {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
