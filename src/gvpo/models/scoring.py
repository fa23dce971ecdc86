"""Log-probs of completions under a model: the one place where sequences are scored.

Covered: causal language models of transformers, PEFT adapters, any attention. A group is one row, its prompt once, only
where the model is known to allow it: full attention by eager or SDPA, and positions that are told. Not covered: models
whose rotary frequencies change with the longest sequence of a batch (rope_type "longrope" or "dynamic", beyond the
length they were first trained with).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.batches import Batch, Inputs, build_inputs, plan_batches
from gvpo.models.encoding import EncodedGroup, encode_groups
from gvpo.models.head import find_head, gather_logprobs, token_logprobs
from gvpo.models.modes import probing, recomputes
from gvpo.models.packed_attention import Way, attending, attention_arguments, fastest_way, is_attending

_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of two computations of one state, relative to the largest; 0.05 in half precision."""

_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")

_IDLE = [EncodedGroup([0], [[0]], [None])]
_IDLE_BATCH = plan_batches(_IDLE, None, share_prefix=False)[0]

_sharing: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


class Scorer(nn.Module):
    """A causal language model as a module whose forward returns log-probs.

    This is what data-parallel wrappers wrap, so that their hooks run on the forward that is back-propagated.
    way: how packed groups attend, see `packed_attention`; default the fastest for model and device.
    Raises UserError for a model that is not a causal one.
    """

    def __init__(self, model: nn.Module, *, way: Way | None = None) -> None:
        super().__init__()
        self.model = model
        causal: Any = causal_lm(model)
        if getattr(causal.config, "is_encoder_decoder", False):
            raise UserError(f"{type(causal).__name__} is an encoder-decoder; give a causal language model")
        self._no_split_modules = getattr(causal, "_no_split_modules", None)
        self.config = causal.config
        self.head = find_head(causal)
        self.vocabulary = len(causal.get_input_embeddings().weight)
        self.context = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
        self.attention = causal.config.get_text_config()._attn_implementation
        self.takes_positions = takes_positions(causal)
        self._way: Way | None = way
        _check_causal(self)

    @property
    def way(self) -> Way:
        """How packed groups attend on the device where the model is now: the fastest that gives what it must."""
        if self._way is not None:
            return self._way
        fastest = fastest_way(causal_lm(self.model), self.attention, next(self.model.parameters()).device)
        ways: dict[Way, list[Way]] = {"flex": ["flex", "members"], "members": ["members"], "mask": []}
        found: Way | None = next((way for way in ways[fastest] if _shares(self, way)), None)
        return found or "mask"

    @property
    def shares_prefix(self) -> bool:
        """Whether the model honours positions and a 4-D mask, so that a group can be one row with its prompt once.

        Measured on first use, and where it has moved to another kind of device, against one row per completion.
        """
        return _shares(self, self.way)

    def forward(self, inputs: Inputs) -> Tensor:
        """Log-probs of the M scored tokens of a batch, float32 (float64 for a float64 model)."""
        if self.head is None:
            return gather_logprobs(self.states(inputs), inputs.targets_M)
        return token_logprobs(self.states(inputs), inputs.targets_M, self.head, self.vocabulary)

    def states(self, inputs: Inputs) -> Tensor:
        """What the M tokens are predicted from: hidden states (M, D), or, where no head fits, logits (M, V)."""
        causal: Any = causal_lm(self.model)
        arguments: dict[str, Any] = {"input_ids": inputs.input_ids_BL, "use_cache": False}
        if self.takes_positions:
            arguments["position_ids"] = inputs.position_ids_BL
        way: Way = "mask"
        if inputs.segments is not None:
            way = self._way_of_this_forward()
            arguments |= attention_arguments(way, inputs.segments, self._mask_dtype)
        with attending(causal, way, self.attention):
            if self.head is None:
                states_BLX = causal(**arguments).logits
            else:
                states_BLX = causal.base_model(**arguments).last_hidden_state
        return states_BLX.flatten(0, 1)[inputs.sources_M]

    def attending(self, batch: Batch | None) -> AbstractContextManager[None]:
        """For a forward pass together with its backward pass: layers may then be computed twice, in one way."""
        way: Way = self.way if batch is not None and batch.packed else "mask"
        return attending(causal_lm(self.model), way, self.attention)

    def _way_of_this_forward(self) -> Way:
        way, causal = self.way, causal_lm(self.model)
        if torch.is_grad_enabled() and recomputes(self.model) and not is_attending(causal, way, self.attention):
            # The layers are computed again in a backward pass that comes when the model attends as it always did.
            return "mask"
        return way

    @property
    def _mask_dtype(self) -> torch.dtype | None:
        if self.attention == "sdpa":
            return None
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())


def causal_lm(model: Any) -> Any:
    """The Hugging Face causal model inside a PEFT wrapper, adapters and all; a model that is not wrapped is itself.

    Raises UserError for PEFT methods that prepend virtual tokens: their prompt is not the group's.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return model
    if config.is_prompt_learning:
        raise UserError(f"{config.peft_type} adapters prepend virtual tokens and cannot be scored; use LoRA")
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
    encoded = encode_groups(list(groups), tokenizer)
    return score_plan(scorer, encoded, plan_scoring(scorer, encoded, token_budget, share_prefix))


def as_scorer(model: nn.Module) -> nn.Module:
    """A Scorer of the model; a Scorer, or one inside a data-parallel wrapper, is returned as it is.

    Raises UserError for a wrapper around the model itself: its hooks would not run.
    """
    if isinstance(unwrapped(model), Scorer):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        raise UserError(f"{kind}(model) cannot be scored through; give {kind}(gvpo.Scorer(model)), or the bare model")
    return Scorer(model)


def unwrapped(scorer: nn.Module) -> Scorer:
    """The Scorer inside a data-parallel wrapper; a Scorer is itself."""
    return getattr(scorer, "module", scorer)  # pyright: ignore[reportReturnType]


def plan_scoring(
    scorer: nn.Module, encoded: Sequence[EncodedGroup], token_budget: int | None, share_prefix: bool
) -> list[Batch]:
    """The batches for these groups, after checking ids and lengths against the model.

    Raises UserError naming group and member.
    """
    inner = unwrapped(scorer)
    for number, group in enumerate(encoded):
        _check(number, group, inner)
    return _plan(inner, encoded, token_budget, share_prefix and inner.shares_prefix)


def _plan(scorer: Scorer, encoded: Sequence[EncodedGroup], token_budget: int | None, share: bool) -> list[Batch]:
    # A mask over all groups of a batch would be mostly empty.
    return plan_batches(encoded, token_budget, share, end_to_end=share and scorer.way != "mask")


def score_plan(
    scorer: nn.Module,
    encoded: Sequence[EncodedGroup],
    plan: Sequence[Batch],
    passes: int | None = None,
    *,
    width: int | None = None,
) -> Tensor:
    """Log-probs of all members of the groups, in their order: logps_N, or logps_NT where a width T is given.

    passes: how many forwards to make, where other processes have more batches than this one; default one per batch.
    """
    pieces = [
        score_batch(scorer, encoded, plan[turn] if turn < len(plan) else None, width=width)
        for turn in range(passes or len(plan))
    ][: len(plan)]
    if not pieces:
        return blank_scores(scorer, 0, width)
    logps_N = torch.cat(pieces)
    return torch.zeros_like(logps_N).index_copy(0, member_order(encoded, plan).to(logps_N.device), logps_N)


def score_batch(
    scorer: nn.Module, encoded: Sequence[EncodedGroup], batch: Batch | None, *, width: int | None = None
) -> Tensor:
    """Log-probs of the members of one batch, in the batch's order: sums, or token by token where a width T is given.

    None is the idle pass of a process that has run out of batches while others have not: collectives must meet.
    """
    if batch is None:
        encoded, batch = _IDLE, _IDLE_BATCH
    device = next(scorer.parameters()).device
    inputs = build_inputs(encoded, batch, device)
    token_logps_M = scorer(inputs)
    members = len(batch.members)
    if width is None and device.type == "cpu":
        return blank_scores(scorer, members).index_add(0, inputs.members_M, token_logps_M)
    # A GPU's index_add adds up in any order: the same score would not be the same twice.
    longest = max((len(encoded[group].completion_ids[member]) for group, member in batch.members), default=0)
    zeros_NT = blank_scores(scorer, members, longest if width is None else width)
    logps_NT = zeros_NT.index_put((inputs.members_M, inputs.places_M), token_logps_M)
    return logps_NT.sum(1) if width is None else logps_NT


def blank_scores(scorer: nn.Module, members: int, width: int | None = None) -> Tensor:
    """Zeros to put log-probs in: (N,), or (N, T) for a width T."""
    shape = (members,) if width is None else (members, width)
    return torch.zeros(shape, dtype=score_dtype(scorer), device=next(scorer.parameters()).device)


def scored_mask(encoded: Sequence[EncodedGroup]) -> Tensor:
    """mask_NT of all members in order, True where a token is scored; T: the longest completion's length, at least 1."""
    rows = [
        [True] * len(ids) if scored is None else scored
        for group in encoded
        for ids, scored in zip(group.completion_ids, group.scored, strict=True)
    ]
    width = max([1, *map(len, rows)])
    return torch.tensor([row + [False] * (width - len(row)) for row in rows], dtype=torch.bool).view(-1, width)


def score_dtype(scorer: nn.Module) -> torch.dtype:
    """The dtype of this model's log-probs: float32, or float64 for a float64 model."""
    return torch.promote_types(next(scorer.parameters()).dtype, torch.float32)


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
        if scorer.context is not None and 0 < scorer.context < group.length(member):
            raise UserError(
                f"group {number}, member {member}: prompt and completion are {group.length(member)} tokens, more than "
                f"the model's context of {scorer.context}; shorten or drop it"
            )


def _shares(scorer: Scorer, way: Way) -> bool:
    """Whether a packed group gives the states of separate rows: measured once per model, way and kind of device."""
    known = _sharing[scorer.model]
    key = (scorer.attention, way, next(scorer.parameters()).device.type)
    if key not in known:
        known[key] = _can_be_packed(scorer) and _sharing_is_exact(Scorer(scorer.model, way=way))
    return known[key]


def _check_causal(scorer: Scorer) -> None:
    if scorer.model in _sharing:
        return
    after_prompt = _probe_states(scorer, share=False)[:, 0]
    # A model that gives NaN is broken in another way, which whoever uses its scores sees and names.
    if not after_prompt.isnan().any() and not _same(after_prompt[:1], after_prompt[1:]):
        raise UserError(
            f"{type(causal_lm(scorer.model)).__name__} is not causal: what it predicts depends on later tokens; "
            "give a causal language model"
        )
    _sharing[scorer.model] = {}


def _sharing_is_exact(scorer: Scorer) -> bool:
    return _same(_probe_states(scorer, share=False), _probe_states(scorer, share=True))


def _probe_states(scorer: Scorer, share: bool) -> Tensor:
    """The states that precede each of 3 tokens in 3 completions of one prompt, (3, 3, D)."""
    prompt = [token % scorer.vocabulary for token in (3, 1, 4, 1, 5)]
    completions = [[token % scorer.vocabulary for token in tokens] for tokens in ((9, 2, 6), (5, 3, 5), (8, 9, 7))]
    group = EncodedGroup(prompt, completions, [None, None, None])
    (batch,) = _plan(scorer, [group], None, share)
    with probing(scorer):
        inputs = build_inputs([group], batch, next(scorer.parameters()).device)
        return scorer.states(inputs).unflatten(0, (3, 3))


def _can_be_packed(scorer: Scorer) -> bool:
    return scorer.attention in ("sdpa", "eager") and attends_to_all(causal_lm(scorer.model))


def takes_positions(causal: Any) -> bool:
    """Whether the base model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(causal.base_model.forward).parameters


def attends_to_all(causal: Any) -> bool:
    """Whether every layer attends to all earlier tokens, at positions that it is told; read from the config."""
    # A 4-D mask replaces a window's own mask, and ALiBi counts columns: neither need show on a short probe.
    config = causal.config.get_text_config()
    if not takes_positions(causal) or getattr(config, "alibi", False):
        return False
    if getattr(config, "layer_types", None):
        return set(config.layer_types) == {"full_attention"}
    return not any(getattr(config, name, None) for name in _WINDOWS)


def _same(states: Tensor, others: Tensor) -> bool:
    tolerance = _PROBE_TOLERANCE.get(states.dtype, 0.05)
    return bool((states - others).abs().max() <= tolerance * states.abs().max())
