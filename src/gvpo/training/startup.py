"""Checks before the first update: a score must be a function of the weights, whichever way it is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.batches import Batch
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.head import gather_logprobs
from gvpo.models.scoring import Scorer, causal_lm, member_order, plan_scoring
from gvpo.training.update import score_pass


@torch.no_grad()
def check_scores(scorer: nn.Module, group: Group | None, tokenizer: Any | None, *, bf16: bool) -> list[str]:
    """Score one group twice, and in every other way there is; None runs empty passes beside other processes.

    Returns warnings: one for every way that differs by more than 1e-3 nats a token (0.05 in half precision).
    Raises UserError if the same computation gives two results: dropout, or non-deterministic kernels.
    """
    encoded = [] if group is None else encode_groups([group], tokenizer)
    inner: Scorer = getattr(scorer, "module", scorer)  # pyright: ignore[reportAssignmentType]
    ways = [True, False] if inner.shares_prefix else [False]
    plans = {share: plan_scoring(scorer, encoded, None, share) for share in ways}
    scores = {share: score_pass(scorer, encoded, plan[0] if plan else None) for share, plan in plans.items()}
    again = score_pass(scorer, encoded, plans[False][0] if encoded else None)
    if group is None:
        return []
    if not torch.equal(scores[False], again):
        worst = float((scores[False] - again).abs().max())
        raise UserError(
            f"scoring the same group twice gives log-probs {worst:.3g} nats apart; switch off what is random in the "
            "model's forward (disable_dropout=True sets dropout rates to 0), or use deterministic kernels"
        )
    tokens = max(len(ids) for ids in encoded[0].completion_ids)
    limit = 0.05 if bf16 or _is_half(scorer) else 1e-3
    apart = _in_order(scores[False], encoded, plans[False])
    own = torch.stack([_own_score(inner, encoded[0], member) for member in range(len(encoded[0].completion_ids))])
    warnings = _compare("the log-prob head, against the model's own logits,", own, apart, tokens, limit)
    if True in scores:
        shared = _in_order(scores[True], encoded, plans[True])
        warnings += _compare("share_prefix, against one row a completion,", shared, apart, tokens, limit)
    return warnings


def _in_order(scores: Tensor, encoded: list[EncodedGroup], plan: list[Batch]) -> Tensor:
    return torch.zeros_like(scores).index_copy(0, member_order(encoded, plan).to(scores.device), scores)


def _compare(what: str, one: Tensor, other: Tensor, tokens: int, limit: float) -> list[str]:
    worst = float((one.double() - other.double()).abs().max()) / max(tokens, 1)
    return [f"{what} differs by {worst:.2g} nats a token (expected below {limit:g})"] if worst > limit else []


def _own_score(scorer: Scorer, group: EncodedGroup, member: int) -> Tensor:
    device = next(scorer.parameters()).device
    completion, scored = group.completion_ids[member], group.scored[member]
    ids = torch.tensor([group.prompt_ids + completion], device=device)
    positions = torch.arange(ids.shape[1], device=device)[None]
    logits_LV = causal_lm(scorer.model)(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    start = len(group.prompt_ids)
    logps = gather_logprobs(logits_LV[start - 1 : -1], ids[0, start:])
    return logps.sum() if scored is None else logps[torch.tensor(scored, device=device)].sum()


def _is_half(scorer: nn.Module) -> bool:
    return next(scorer.parameters()).dtype in (torch.bfloat16, torch.float16)
