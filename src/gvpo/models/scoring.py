"""Log-probs of completions under a model: the one place where sequences are scored."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.batches import Batch, Inputs, build_inputs, plan_batches
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.head import find_head, gather_logprobs, token_logprobs
from gvpo.models.modes import evaluating

_SHARING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Nats a token; 0.05 for half precision."""

_sharing: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


class Scorer(nn.Module):
    """A causal language model as a module whose forward returns log-probs.

    This is what data-parallel wrappers wrap, so that their hooks run on the forward that is back-propagated.
    shares_prefix: whether the model honours positions and a 4-D mask, so that a group can be one row with its prompt
    once; measured here, against one row a completion.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal: Any = causal_lm(model)
        self._no_split_modules = getattr(causal, "_no_split_modules", None)
        self.config = causal.config
        self.head = find_head(causal)
        self.vocabulary = int(causal.get_input_embeddings().num_embeddings)
        self.context = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
        self.attention = causal.config._attn_implementation
        self.shares_prefix = _may_share(self)

    def forward(self, inputs: Inputs) -> Tensor:
        """Log-probs of the M scored tokens of a batch, float32 (float64 for a float64 model)."""
        causal: Any = causal_lm(self.model)
        arguments = {"input_ids": inputs.input_ids_BL, "position_ids": inputs.position_ids_BL, "use_cache": False}
        if inputs.mask_BL is not None:
            arguments["attention_mask"] = self._attention_mask(inputs.mask_BL)
        if self.head is None:
            logits_BLV = causal(**arguments).logits
            return gather_logprobs(logits_BLV.flatten(0, 1)[inputs.sources_M], inputs.targets_M)
        hidden_BLD = causal.base_model(**arguments).last_hidden_state
        hidden_MD = hidden_BLD.flatten(0, 1)[inputs.sources_M]
        return token_logprobs(hidden_MD, inputs.targets_M, self.head, self.vocabulary)

    def _attention_mask(self, seen: Tensor) -> Tensor:
        if self.attention == "sdpa":
            return seen
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def causal_lm(model: Any) -> Any:
    """The Hugging Face causal model inside a PEFT wrapper, adapters and all; a model that is not wrapped is itself.

    Raises UserError for PEFT methods that prepend virtual tokens: their prompt is not the group's.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model
    if config.is_prompt_learning:
        raise UserError(f"{config.peft_type} adapters prepend virtual tokens and cannot be scored; use LoRA or its kin")
    return model.get_base_model()


def sequence_logprobs(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    tokenizer: Any | None = None,
    token_budget: int | None = None,
    share_prefix: bool = True,
) -> Tensor:
    """Log-prob of every completion given its prompt: log pi(y|x), the sum over its scored tokens.

    model: a Hugging Face causal model, a PEFT model, or a Scorer. groups: in any number and shape, laid end to end.
    tokenizer: needed where a group has text without ids. token_budget: most token positions in one forward, prompt and
    padding included; None = no limit. share_prefix: compute the prompt once per group where the model allows it.
    Returns logps_N, N = all completions in order: nats, <= 0, float32 (float64 for a float64 model), differentiable.
    Raises UserError if one prompt with one completion exceeds the budget or the model's context, or ids the vocabulary.
    """
    scorer = as_scorer(model)
    encoded = encode_groups(groups, tokenizer)
    plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
    device = next(scorer.parameters()).device
    pieces = [score_batch(scorer, encoded, batch, device) for batch in plan]
    if not pieces:
        return torch.zeros(0, device=device)
    order = member_order(encoded, plan).to(device)
    logps_N = torch.cat(pieces)
    return torch.zeros_like(logps_N).index_copy(0, order, logps_N)


def as_scorer(model: nn.Module) -> Scorer:
    """The model's Scorer; a Scorer, or one under a data-parallel wrapper, is itself."""
    inner = getattr(model, "module", model)
    return model if isinstance(inner, Scorer) else Scorer(model)  # pyright: ignore[reportReturnType]


def plan_scoring(
    scorer: nn.Module, encoded: Sequence[EncodedGroup], token_budget: int | None, share_prefix: bool
) -> list[Batch]:
    """The batches for these groups, after checking ids and lengths against the model.

    Raises UserError naming group and member.
    """
    inner: Scorer = getattr(scorer, "module", scorer)  # pyright: ignore[reportAssignmentType]
    for number, group in enumerate(encoded):
        _check(number, group, inner)
    return plan_batches(encoded, token_budget, share_prefix and inner.shares_prefix)


def score_batch(scorer: nn.Module, encoded: Sequence[EncodedGroup], batch: Batch, device: torch.device) -> Tensor:
    """Log-probs of the members of one batch, in the batch's order."""
    inputs = build_inputs(encoded, batch, device)
    token_logps_M = scorer(inputs)
    zeros = torch.zeros(len(batch.members), dtype=token_logps_M.dtype, device=device)
    return zeros.index_add(0, inputs.members_M, token_logps_M)


def member_order(encoded: Sequence[EncodedGroup], plan: Sequence[Batch]) -> Tensor:
    """For the batches' members one after another: their place among all N members."""
    starts, total = [], 0
    for group in encoded:
        starts.append(total)
        total += len(group.completion_ids)
    return torch.tensor([starts[group] + member for batch in plan for group, member in batch.members])


def _check(number: int, group: EncodedGroup, scorer: Scorer) -> None:
    for member, completion in enumerate(group.completion_ids):
        largest = max(max(group.prompt_ids), max(completion, default=0))
        if largest >= scorer.vocabulary:
            raise UserError(
                f"group {number}, member {member}: token id {largest} is outside the model's vocabulary of "
                f"{scorer.vocabulary}; were the ids made by another tokenizer?"
            )
        if scorer.context is not None and group.length(member) > scorer.context:
            raise UserError(
                f"group {number}, member {member}: prompt and completion are {group.length(member)} tokens, more than "
                f"the model's context of {scorer.context}; shorten or drop it"
            )


def _may_share(scorer: Scorer) -> bool:
    """Whether a packed group gives the log-probs of separate rows: measured once per model and attention."""
    known = _sharing.setdefault(scorer.model, {})
    if scorer.attention not in known:
        known[scorer.attention] = (
            scorer.attention in ("sdpa", "eager") and _attends_fully(scorer.config.get_text_config())
        ) and _sharing_is_exact(scorer)
    return known[scorer.attention]


def _attends_fully(config: Any) -> bool:
    # A 4-D mask replaces a sliding window's own mask, which no short probe would notice.
    if getattr(config, "layer_types", None):
        return set(config.layer_types) == {"full_attention"}
    return not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", True) is False


@torch.no_grad()
def _sharing_is_exact(scorer: Scorer) -> bool:
    prompt = [token % scorer.vocabulary for token in (3, 1, 4, 1, 5)]
    completions = [[token % scorer.vocabulary for token in tokens] for tokens in ((9, 2, 6), (5, 3, 5), (8, 9, 7))]
    probe = [EncodedGroup(prompt, completions, [None, None, None])]
    device = next(scorer.parameters()).device
    with evaluating(scorer):
        shared, apart = (
            torch.cat([score_batch(scorer, probe, batch, device) for batch in plan_batches(probe, None, share)])
            for share in (True, False)
        )
    difference = float((shared - apart).abs().max()) / len(completions[0])
    return difference <= _SHARING_TOLERANCE.get(next(scorer.parameters()).dtype, 0.05)
