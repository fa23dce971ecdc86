"""Attention over packed groups: a prompt, then completions of it, each of which sees the prompt and itself.

Three ways to the same numbers. `flex`: FlexAttention's block mask, on GPUs. `members`: SDPA, every completion as a row
that has the prompt's keys in front of its own. `mask`: the model's own SDPA or eager attention under a mask over whole
rows, in which all tokens of a row are compared: (P + kT)^2 products for a prompt of P and k completions of T, where the
others take P^2 + kT(P + T).

Covered: models of transformers whose attention goes through the attention interface; others, and layers that ask of
their attention more than `members` computes (soft caps, sinks, windows, biases, dropout), take the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gvpo.models.batches import Segments
from gvpo.models.modes import triton_obstacle

Way = Literal["flex", "members", "mask"]

ATTENTION = "gvpo_packed_groups"

HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
"""What models hand to their attention that changes nothing in it; whatever else they hand to it, such as soft caps,
sinks, windows or chosen keys, is not computed in this library."""

_COPIES = 4
"""Keys, prompts' copies included, that are kept for the backward pass, in multiples of the batch's tokens; where there
are more, they are made again there."""


def fastest_way(causal: Any, attention: str, device: torch.device) -> Way:
    """The way for this causal model of transformers, of that attention implementation, on this device."""
    if attention != "sdpa" or not reaches_attention(causal):
        return "mask"
    config = causal.config.get_text_config()
    layers = [module for module in causal.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
    if not all(layer.config is config for layer in layers):
        return "mask"
    dropout = any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in config.to_dict().items())
    dtype = next(causal.parameters()).dtype
    fits_flex = getattr(causal, "_supports_flex_attn", False) and not dropout and dtype != torch.float64
    return "flex" if fits_flex and flex_obstacle(device) is None else "members"


def reaches_attention(causal: Any) -> bool:
    """Whether a model can attend by functions of this library, and hand them what it does not know of."""
    parameters = inspect.signature(causal.base_model.forward).parameters.values()
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(getattr(causal, "_supports_attention_backend", False)) and hands_on


def flex_obstacle(device: torch.device) -> str | None:
    """Why FlexAttention cannot train on this device; None = it can."""
    if device.type != "cuda":
        return "flex_attention has no backward pass on a CPU" if device.type == "cpu" else "no flex_attention"
    return triton_obstacle()


@contextmanager
def attending(causal: Any, way: Way, attention: str) -> Iterator[None]:
    """Have a causal model, whose own implementation of attention is named, attend in this way inside the block."""
    from transformers import AttentionInterface  # late: `import gvpo` must stay light

    AttentionInterface.register(ATTENTION, _attend)
    config = causal.config.get_text_config()
    before = config._attn_implementation
    # Under the empty key, as configs within it, of parts that see no text, keep their own.
    config._attn_implementation = {"": _implementation(way, attention)}
    try:
        yield
    finally:
        config._attn_implementation = {"": before}


def is_attending(config: Any, way: Way, attention: str) -> bool:
    """Whether a model with this text config attends in this way now."""
    return config._attn_implementation == _implementation(way, attention)


def _implementation(way: Way, attention: str) -> str:
    return {"flex": "flex_attention", "members": ATTENTION, "mask": attention}[way]


def attention_arguments(way: Way, segments: Segments, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a base model is given for it, beside ids and positions.

    dtype: of the mask that is added to the scores of eager attention; None = a boolean one.
    """
    if way == "flex":
        return {"attention_mask": _block_mask(segments)}
    if way == "members":
        return {"packed_groups": PackedGroups.of(segments)}
    seen = dense_mask(segments)
    if dtype is not None:
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": seen}


def dense_mask(segments: Segments) -> Tensor:
    """(B, 1, L, L), True where a query sees a key: an earlier one of its group, of prompt or same completion."""
    rows, width = segments.group_BL.shape
    places = torch.arange(width, device=segments.group_BL.device)
    row = torch.arange(rows, device=places.device)[:, None, None]
    return sees(segments)(row, row, places[:, None], places)[:, None]


def sees(segments: Segments) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as a function of row, head, query and key."""
    group_BL, member_BL = segments.group_BL, segments.member_BL

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        of_group = group_BL[row, query] == group_BL[row, key]
        of_member = (member_BL[row, query] == member_BL[row, key]) | (member_BL[row, key] == 0)
        return of_group & of_member & (key <= query)

    return seen


def _block_mask(segments: Segments) -> Any:
    """The mask as FlexAttention's."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = segments.group_BL.shape
    return create_block_mask(sees(segments), rows, None, width, width, device=str(segments.group_BL.device))


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """Where the tokens of a batch are by group: G groups with at most P tokens of prompt and M completions of T tokens.

    places_S: for all S = G * (P + M * T) slots, the flat place in (B, L) of its token; slots of none have some place.
    slots_BL: for every place its slot, flat. seen: (G * M or 1, 1, T, P + T), True where a completion's token sees one
    of its prompt or of its own.
    """

    segments: Segments
    prompt_width: int
    members: int
    tokens: int
    places_S: Tensor
    slots_BL: Tensor
    seen: Tensor

    @classmethod
    def of(cls, segments: Segments) -> PackedGroups:
        """Read from the segments, each of which is without gaps."""
        group_N, member_N = segments.group_BL.flatten(), segments.member_BL.flatten()
        device = group_N.device
        groups, members = int(group_N.max()) + 1, int(member_N.max())
        places_N, real_N = torch.arange(len(group_N), device=device), member_N >= 0
        segment_N = group_N * (members + 1) + member_N.clamp(min=0)
        counts_GM = segment_N[real_N].bincount(minlength=groups * (members + 1)).view(groups, members + 1)
        starts_GM = torch.full_like(counts_GM.view(-1), len(group_N))
        starts_GM = starts_GM.scatter_reduce(0, segment_N[real_N], places_N[real_N], "amin").view_as(counts_GM)
        prompt_width, tokens = int(counts_GM[:, 0].max()), int(counts_GM[:, 1:].max()) if members else 0

        def places(segments: slice, width: int) -> tuple[Tensor, Tensor]:
            """Of so many slots for each segment; and which of them have a token."""
            at = torch.arange(width, device=device)
            filled = at < counts_GM[:, segments, None]
            return (starts_GM[:, segments, None] + at).where(filled, 0).flatten(1), filled.flatten(1)

        prompts_GP, in_prompt_GP = places(slice(0, 1), prompt_width)
        own_GT, _ = places(slice(1, None), tokens)

        within_N = places_N - starts_GM.flatten()[segment_N]
        slots_N = torch.where(member_N > 0, prompt_width + (member_N - 1) * tokens, 0) + within_N
        slots_N = (slots_N + group_N * (prompt_width + members * tokens)).where(real_N, 0)

        if bool(in_prompt_GP.all()):
            in_prompt_GP = in_prompt_GP[:1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        prompts = in_prompt_GP[:, None].expand(-1, tokens, -1)
        seen = torch.cat([prompts, causal.expand(len(prompts), -1, -1)], -1)
        seen = seen if len(seen) == 1 else seen.repeat_interleave(members, 0)
        places_S = torch.cat([prompts_GP, own_GT], 1).flatten()
        return cls(segments, prompt_width, members, tokens, places_S, slots_N, seen[:, None])


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_groups: PackedGroups | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own attention."""
    from transformers import AttentionInterface

    if packed_groups is None or dropout > 0 or asks_more(others):
        sdpa = AttentionInterface()["sdpa"]
        if packed_groups is not None:
            attention_mask = dense_mask(packed_groups.segments)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        return attend_by_members(query, key, value, packed_groups, scale), None


def asks_more(arguments: dict[str, Any]) -> bool:
    """Whether a layer hands something to its attention that may change what it is to compute."""
    return any(value is not None and name not in HARMLESS for name, value in arguments.items())


def attend_by_members(query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float) -> Tensor:
    """Attention of packed rows: queries (B, heads, L, D), keys and values (B, kv heads, L, D), to (B, L, heads, D).

    On CPUs in float32 at least: with so few queries at a time bfloat16 is slower there.
    """
    dtype, rows = query.dtype, len(query)
    if query.device.type == "cpu":
        query, key, value = (states.to(torch.promote_types(dtype, torch.float32)) for states in (query, key, value))
    keys = groups.seen.shape[-1] * groups.members
    if torch.is_grad_enabled() and keys > _COPIES * (groups.prompt_width + groups.members * groups.tokens):
        both = checkpoint(_by_group, query, key, value, groups, scale, use_reentrant=False, preserve_rng_state=False)
    else:
        both = _by_group(query, key, value, groups, scale)
    return both.index_select(0, groups.slots_BL).unflatten(0, (rows, -1)).to(dtype)  # pyright: ignore


def _by_group(query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float) -> Tensor:
    """Attention in every slot, (S, heads, D)."""
    prompt, members = groups.prompt_width, groups.members

    def by_group(states_BHLD: Tensor) -> Tensor:
        """(G, H, P + M * T, D)."""
        slots = states_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, groups.places_S)
        return slots.unflatten(0, (-1, prompt + members * groups.tokens)).transpose(1, 2)

    def own(states_GHSD: Tensor) -> Tensor:
        """(G * M, H, T, D)."""
        return states_GHSD[:, :, prompt:].unflatten(2, (members, -1)).transpose(1, 2).flatten(0, 1)

    def behind_prompt(states_GHSD: Tensor) -> Tensor:
        """(G * M, H, P + T, D)."""
        prompts = states_GHSD[:, None, :, :prompt].expand(-1, members, -1, -1, -1).flatten(0, 1)
        return torch.cat([prompts, own(states_GHSD)], 2)

    gqa = query.shape[1] != key.shape[1]
    query, key, value = map(by_group, (query, key, value))
    of_prompts = (states[:, :, :prompt] for states in (query, key, value))
    out = scaled_dot_product_attention(*of_prompts, is_causal=True, scale=scale, enable_gqa=gqa)  # pyright: ignore
    out = out.transpose(1, 2)
    if groups.tokens:
        of_members = scaled_dot_product_attention(
            own(query), behind_prompt(key), behind_prompt(value), attn_mask=groups.seen, scale=scale, enable_gqa=gqa
        )
        of_members = of_members.unflatten(0, (-1, members)).permute(0, 1, 3, 2, 4).flatten(1, 2)
        out = torch.cat([out, of_members], 1)
    return out.flatten(0, 1)
