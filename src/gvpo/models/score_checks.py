"""Is a score what it must be: the same when it is computed twice, and however it is computed?

Used before a run's first update, and by `gvpo doctor`.
"""

from __future__ import annotations

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
def score_checks(scorer: Scorer, groups: Sequence[Group], *, half: bool = False) -> list[Check]:
    """Score groups of token ids twice, then in every other way there is.

    half: whether half-precision autocast is on around the call. Without groups there is nothing to check.
    Returns first "the same score, twice", which must hold bit for bit; then, within a tolerance, the log-prob head
    against the model's own logits, and shared prompts against separate rows (where the model shares them).
    """
    if not groups:
        return []
    encoded = encode_groups(groups, None)
    apart_N, again_N = (_scores(scorer, encoded, share_prefix=False) for _ in range(2))
    own_N = own_logprobs(causal_lm(scorer.model), encoded)
    limit = tolerance(scorer, half=half)
    tokens_N = torch.tensor([max(count, 1) for group in encoded for count in _scored_tokens(group)])
    equal = torch.equal(apart_N, again_N)
    detail = "equal bit for bit" if equal else f"{float((apart_N - again_N).abs().max()):.3g} nats apart"
    checks = [
        Check("the same score, twice", equal, detail),
        _close("log-prob head, against the model's logits", apart_N, own_N, tokens_N, limit),
    ]
    if scorer.shares_prefix:
        shared_N = _scores(scorer, encoded, share_prefix=True)
        checks.append(_close(SHARING, shared_N, apart_N, tokens_N, limit))
    return checks


def tolerance(scorer: nn.Module, *, half: bool = False) -> float:
    """Nats per token that two ways to compute one score may differ by; half: whether half-precision autocast is on."""
    half = half or next(scorer.parameters()).dtype in (torch.bfloat16, torch.float16)
    return HALF_TOLERANCE if half else TOLERANCE


def own_logprobs(model: Any, groups: Sequence[EncodedGroup]) -> Tensor:
    """Log-probs straight from the model's own logits, one completion at a time: logps_N, nats."""
    device, scores = next(model.parameters()).device, []
    for group in groups:
        for completion, scored in zip(group.completion_ids, group.scored, strict=True):
            ids_1L = torch.tensor([group.prompt_ids + completion], device=device)
            logits_LV = model(input_ids=ids_1L, use_cache=False).logits[0]
            start = len(group.prompt_ids)
            logps_T = gather_logprobs(logits_LV[start - 1 : -1], ids_1L[0, start:])
            scores.append(logps_T.sum() if scored is None else logps_T[torch.tensor(scored, device=device)].sum())
    return torch.stack(scores)


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
