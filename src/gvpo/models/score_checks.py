"""Is a score what it must be: the same when it is computed twice, and however it is computed?

Used before a run's first update, and by `gvpo doctor`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.groups import Group
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.head import gather_logprobs
from gvpo.models.scoring import Scorer, causal_lm, plan_scoring, score_plan

SHARING = "prompts shared, against rows apart"
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05
"""Nats per token between two ways to compute one score, in float32 and in half precision."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must be true, whether it is, and the number that says so."""

    name: str
    holds: bool
    detail: str


@torch.no_grad()
def score_checks(
    scorer: Scorer, groups: Sequence[Group], *, half: bool = False, share_prefix: bool = True
) -> list[Check]:
    """Score groups of token ids twice in one way, then once in every other way there is.

    half: whether half-precision autocast is on around the call. share_prefix: whether prompts are shared in the way
    that is tried twice, where the model allows it. Without groups there is nothing to check.
    Returns first "the same score, twice", which must hold bit for bit; then, within a tolerance, the log-prob head
    against the model's own logits, on the longest completion, and shared prompts against separate rows (where the model
    shares them).
    """
    if not groups:
        return []
    encoded = encode_groups(groups, None)
    shares = scorer.shares_prefix
    scores = {way: _scores(scorer, encoded, share_prefix=way) for way in {False, shares}}
    apart_N, once_N = scores[False], scores[share_prefix and shares]
    again_N = _scores(scorer, encoded, share_prefix=share_prefix and shares)
    limit = tolerance(scorer, half=half)
    tokens_N = torch.tensor([max(count, 1) for group in encoded for count in _scored_tokens(group)])
    equal = torch.equal(once_N, again_N)
    detail = "equal bit for bit" if equal else f"{float((once_N - again_N).abs().max()):.3g} nats apart"
    # The head sees token by token: one completion shows what it does.
    longest = int(tokens_N.argmax())
    own_1, one = own_logprobs(causal_lm(scorer.model), [_members(encoded)[longest]]), slice(longest, longest + 1)
    head = _close("log-prob head, against the model's logits", apart_N[one], own_1, tokens_N[one], limit)
    checks = [Check("the same score, twice", equal, detail), head]
    if shares:
        checks.append(_close(SHARING, scores[True], apart_N, tokens_N, limit))
    return checks


def tolerance(scorer: nn.Module, *, half: bool = False) -> float:
    """Nats per token that two ways to compute one score may differ by; half: whether half-precision autocast is on."""
    half = half or next(scorer.parameters()).dtype in (torch.bfloat16, torch.float16)
    return HALF_TOLERANCE if half else TOLERANCE


def own_logprobs(model: Any, groups: Sequence[EncodedGroup]) -> Tensor:
    """Log-probs straight from the model's own logits, one completion at a time: logps_N, nats."""
    device, scores = next(model.parameters()).device, []
    can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    for group in _members(groups):
        (completion,), (scored,) = group.completion_ids, group.scored
        ids_1L = torch.tensor([group.prompt_ids + completion], device=device)
        # A long prompt's logits may not fit; the last position's are of a token that is not there.
        kept = len(completion) + 1
        options = {"logits_to_keep": kept} if can_leave_out else {}
        logits_TV = model(input_ids=ids_1L, use_cache=False, **options).logits[0, -kept:-1]
        logps_T = gather_logprobs(logits_TV, ids_1L[0, len(group.prompt_ids) :])
        scores.append(logps_T.sum() if scored is None else logps_T[torch.tensor(scored, device=device)].sum())
    return torch.stack(scores)


def _members(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
    """Every completion by itself, as a group of one."""
    return [
        EncodedGroup(group.prompt_ids, [completion], [scored])
        for group in groups
        for completion, scored in zip(group.completion_ids, group.scored, strict=True)
    ]


def _scores(scorer: Scorer, encoded: Sequence[EncodedGroup], *, share_prefix: bool) -> Tensor:
    return score_plan(scorer, encoded, plan_scoring(scorer, encoded, None, share_prefix))


def _scored_tokens(group: EncodedGroup) -> list[int]:
    return [
        len(ids) if scored is None else sum(scored)
        for ids, scored in zip(group.completion_ids, group.scored, strict=True)
    ]


def _close(name: str, one_N: Tensor, other_N: Tensor, tokens_N: Tensor, limit: float) -> Check:
    difference_N = (one_N.double() - other_N.double()).abs().cpu()
    worst = float((difference_N / tokens_N).max())
    detail = f"{float(difference_N.max()):.2g} nats, {worst:.2g} per token (limit {limit:g})"
    return Check(name, worst <= limit, detail)  # written so that NaN fails
