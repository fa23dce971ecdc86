"""Attention over packed groups: a row is a prompt, then completions of it, each of which sees the prompt and itself.

Three ways to the same numbers. `flex`: FlexAttention's block mask, on GPUs. `members`: SDPA, every completion as a row
that has the prompt's keys in front of its own. `mask`: the model's own SDPA or eager attention under a mask over the
whole row, in which every completion is compared with every other: (P + kT)^2 products for a prompt of P and k
completions of T, where the others take P^2 + kT(P + T).

Covered: models of transformers whose attention goes through the attention interface; others, and layers that ask of
their attention more than `members` computes (soft caps, sinks, windows, biases, dropout), take the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gvpo.models.modes import triton_obstacle

Way = Literal["flex", "members", "mask"]

ATTENTION = "gvpo_packed_groups"

HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
"""What models hand to their attention that changes nothing in it; whatever else they hand to it, such as soft caps,
sinks, windows or chosen keys, is not computed in this library."""

_COPIES = 4
"""Copies of prompts' keys that are kept for the backward pass, in row lengths; more are made again there."""


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


def attention_arguments(way: Way, segments_BL: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a base model is given for it, beside ids and positions.

    segments_BL: 0 for tokens of a row's prompt, m for those of its m-th completion, -1 for padding. dtype: of the mask
    that is added to the scores of eager attention; None = a boolean one.
    """
    if way == "flex":
        return {"attention_mask": _block_mask(segments_BL)}
    seen = dense_mask(segments_BL)
    if dtype is not None:
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    if way == "mask" or not (segments_BL > 0).any():
        return {"attention_mask": seen}
    return {"attention_mask": seen, "packed_groups": PackedGroups.of(segments_BL)}


def dense_mask(segments_BL: Tensor) -> Tensor:
    """(B, 1, L, L), True where a query sees a key: an earlier one, of the prompt or of the same completion."""
    query, key = segments_BL[:, :, None], segments_BL[:, None, :]
    causal = torch.ones_like(query == key).tril()
    return (((query == key) | (key == 0)) & causal)[:, None]


def _block_mask(segments_BL: Tensor) -> Any:
    """The same mask, as FlexAttention's."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = segments_BL.shape
    return create_block_mask(sees(segments_BL), rows, None, width, width, device=str(segments_BL.device))


def sees(segments_BL: Tensor) -> Any:
    """The same mask, as a function of (row, head, query, key)."""

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        del h
        own, other = segments_BL[b, q], segments_BL[b, kv]
        return ((own == other) | (other == 0)) & (kv <= q)

    return seen


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """Where prompts and completions are in B rows of L columns; P: longest prompt, M: most members, T: most tokens.

    places_N: for all N = B * M * T tokens of completions, the flat place (b * L + column) that they are at; padding
    repeats some place. seen_NTX: (B * M or 1, 1, T, P + T), True where a completion's token sees one of its prompt or
    of its own. sources_BL: for every column, its place in (B, P + M * T), prompts first; flat.
    """

    prompt_width: int
    members: int
    tokens: int
    places_N: Tensor
    seen: Tensor
    sources_BL: Tensor

    @classmethod
    def of(cls, segments_BL: Tensor) -> PackedGroups:
        """Read from the segments, of which one at least is a completion's: see `attention_arguments`."""
        device = segments_BL.device
        rows, width = segments_BL.shape
        prompts_B = (segments_BL == 0).sum(1)
        columns_L = torch.arange(width, device=device)
        starts_BM = torch.stack([(segments_BL == m + 1).int().argmax(1) for m in range(int(segments_BL.max()))], 1)
        counts_BM = torch.stack([(segments_BL == m + 1).sum(1) for m in range(starts_BM.shape[1])], 1)
        prompt_width, members, tokens = int(prompts_B.max()), starts_BM.shape[1], int(counts_BM.max())

        at_T = torch.arange(tokens, device=device)
        real_BMT = at_T < counts_BM[..., None]
        places_BMT = (starts_BM[..., None] + at_T).where(real_BMT, 0) + width * torch.arange(rows, device=device)[
            :, None, None
        ]

        segment_BL = (segments_BL - 1).clamp(min=0)
        own_BL = prompt_width + segment_BL * tokens + columns_L - starts_BM.gather(1, segment_BL)
        sources_BL = torch.where(segments_BL > 0, own_BL, columns_L.where(segments_BL == 0, 0))
        sources_BL += (prompt_width + members * tokens) * torch.arange(rows, device=device)[:, None]

        in_prompt_BP = torch.arange(prompt_width, device=device) < prompts_B[:, None]
        if bool(in_prompt_BP.all()):
            in_prompt_BP = in_prompt_BP[:1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        seen = torch.cat(
            [in_prompt_BP[:, None].expand(-1, tokens, -1), causal.expand(len(in_prompt_BP), tokens, tokens)], -1
        )
        if len(seen) > 1:
            seen = seen.repeat_interleave(members, 0)
        return cls(prompt_width, members, tokens, places_BMT.flatten(), seen[:, None], sources_BL.flatten())


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
    dtype, gqa = query.dtype, query.shape[1] != key.shape[1]
    if query.device.type == "cpu":
        query, key, value = (states.to(torch.promote_types(dtype, torch.float32)) for states in (query, key, value))
    width, prompt = query.shape[2], groups.prompt_width
    of_prompts = scaled_dot_product_attention(
        query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], is_causal=True, scale=scale, enable_gqa=gqa
    )
    given = (query, key, value, groups, scale)
    if torch.is_grad_enabled() and groups.members * (prompt + groups.tokens) > _COPIES * width:
        of_members = checkpoint(_of_members, *given, use_reentrant=False, preserve_rng_state=False)
    else:
        of_members = _of_members(*given)
    both = torch.cat([of_prompts.transpose(1, 2), of_members], 1).flatten(0, 1)  # pyright: ignore
    return both.index_select(0, groups.sources_BL).unflatten(0, (-1, width)).to(dtype)


def _of_members(query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float) -> Tensor:
    """Attention of the completions' tokens, (B, M * T, heads, D)."""
    rows, members = len(query), groups.members

    def own(states_BHLD: Tensor) -> Tensor:
        """(B * M, H, T, D)."""
        chosen = states_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, groups.places_N)
        return chosen.unflatten(0, (rows * members, groups.tokens)).transpose(1, 2)

    def behind_prompt(states_BHLD: Tensor) -> Tensor:
        """(B * M, H, P + T, D)."""
        prompts = states_BHLD[:, None, :, : groups.prompt_width].expand(-1, members, -1, -1, -1).flatten(0, 1)
        return torch.cat([prompts, own(states_BHLD)], 2)

    gqa = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        own(query), behind_prompt(key), behind_prompt(value), attn_mask=groups.seen, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2).reshape(rows, members * groups.tokens, *out.shape[1::2])
