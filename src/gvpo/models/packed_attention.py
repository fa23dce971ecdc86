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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gvpo.models.batches import Segments
from gvpo.models.modes import triton_obstacle

Way = Literal["flex", "members", "mask"]

ATTENTION = "gvpo_packed_groups"
FLEX_ATTENTION = "gvpo_packed_flex"

HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
"""What models hand to their attention that changes nothing in it; whatever else they hand to it, such as soft caps,
sinks, windows or chosen keys, is not computed in this library."""

_FLEX_HEAD_DIM = 16
"""FlexAttention's kernels for GPUs take no smaller heads."""

_FLEX_BLOCK = 128
"""Queries and keys in a block of FlexAttention's mask, its default."""

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
    fits_flex = fits_flex and _head_dim(config) >= _FLEX_HEAD_DIM
    return "flex" if fits_flex and flex_obstacle(device) is None else "members"


def _head_dim(config: Any) -> int:
    """Of queries, by the config; 0 where it does not say."""
    told = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", 0)
    return told or (config.hidden_size // heads if heads else 0)


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
    AttentionInterface.register(FLEX_ATTENTION, _attend_by_flex)
    config = causal.config.get_text_config()
    before = config._attn_implementation
    # Under the empty key, as configs within it, of parts that see no text, keep their own.
    config._attn_implementation = {"": _implementation(way, attention)}
    try:
        with many_compiled() if way == "flex" else nullcontext():
            yield
    finally:
        config._attn_implementation = {"": before}


@contextmanager
def many_compiled() -> Iterator[None]:
    """Inside the block, torch.compile keeps more kernels of one function than its usual eight.

    Beyond the limit FlexAttention would run as it is written, with all scores in memory.
    """
    import torch._dynamo.config

    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def is_attending(causal: Any, way: Way, attention: str) -> bool:
    """Whether a causal model, whose own implementation of attention is named, attends in this way now."""
    return causal.config.get_text_config()._attn_implementation == _implementation(way, attention)


def _implementation(way: Way, attention: str) -> str:
    return {"flex": FLEX_ATTENTION, "members": ATTENTION, "mask": attention}[way]


def attention_arguments(way: Way, segments: Segments, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a base model is given for it, beside ids and positions.

    dtype: of the mask that is added to the scores of eager attention; None = a boolean one.
    """
    if way == "flex":
        return {"attention_mask": block_mask(segments)}
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


@dataclass(frozen=True, slots=True)
class Spans:
    """The keys that each query sees, as places in its row: from prompts up to ends, without it, and from own to itself.

    All are (B, L), in int32. Of a query in a prompt the first are none, of the first completion both are one.
    """

    prompts_BL: Tensor
    ends_BL: Tensor
    own_BL: Tensor

    @classmethod
    def of(cls, segments: Segments) -> Spans:
        """Read from the segments, each of which is without gaps."""
        group_BL, member_BL = segments.group_BL, segments.member_BL
        places_BL = torch.arange(group_BL.shape[1], dtype=torch.int32, device=group_BL.device).expand_as(group_BL)
        of_group_BL, of_member_BL, after_prompt_BL = (torch.ones_like(group_BL, dtype=torch.bool) for _ in range(3))
        of_group_BL[:, 1:] = group_BL[:, 1:] != group_BL[:, :-1]
        of_member_BL[:, 1:] = member_BL[:, 1:] != member_BL[:, :-1]
        after_prompt_BL[:, 1:] = member_BL[:, :-1] == 0

        def latest(here_BL: Tensor) -> Tensor:
            return places_BL.where(here_BL, 0).cummax(1).values

        own_BL = latest(of_group_BL | of_member_BL)
        ends_BL = latest((member_BL != 0) & (of_group_BL | after_prompt_BL))
        return cls(latest(of_group_BL), torch.where(member_BL == 0, own_BL, ends_BL), own_BL)

    def sees(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """As `sees` of the segments; nothing is looked up by key, which kernels would do for every pair of blocks."""
        prompts_BL, ends_BL, own_BL = self.prompts_BL, self.ends_BL, self.own_BL

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            of_prompt = (key >= prompts_BL[row, query]) & (key < ends_BL[row, query])
            return of_prompt | ((key >= own_BL[row, query]) & (key <= query))

        return seen

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Of every block of so many queries and keys, (B, 1, N, N): whether any pair sees, and whether all do."""
        width = self.own_BL.shape[1]
        low_N = torch.arange(0, width, size, dtype=torch.int32, device=self.own_BL.device)
        high_N, past_L1 = low_N + size, torch.arange(1, width + 1, dtype=torch.int32, device=low_N.device)[:, None]
        prompts_BL1, ends_BL1, own_BL1 = (one[..., None] for one in (self.prompts_BL, self.ends_BL, self.own_BL))
        any_BLN = (ends_BL1.minimum(high_N) > prompts_BL1.maximum(low_N)) | (
            past_L1.minimum(high_N) > own_BL1.maximum(low_N)
        )
        # A prompt and the completion right behind it are one span.
        first_BL1 = torch.where(ends_BL1 == own_BL1, prompts_BL1, own_BL1)
        all_BLN = ((prompts_BL1 <= low_N) & (ends_BL1 >= high_N)) | ((first_BL1 <= low_N) & (past_L1 >= high_N))

        def of_blocks(seen_BLN: Tensor) -> Tensor:
            return pad(seen_BLN, (0, 0, 0, -width % size)).unflatten(1, (-1, size))

        return of_blocks(any_BLN).any(2)[:, None], of_blocks(all_BLN).all(2)[:, None]


def block_mask(segments: Segments) -> Any:
    """The mask as FlexAttention's, from the spans: torch's own way to it compares all tokens of a row."""
    from torch.nn.attention.flex_attention import BlockMask

    spans, width = Spans.of(segments), segments.group_BL.shape[1]
    some, whole = spans.blocks(_FLEX_BLOCK)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole),
        *listed(whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=spans.sees(),
        seq_lengths=(width, width),
    )


@dataclass(frozen=True, slots=True)
class Block:
    """N prompts or completions of about one length, of at most T tokens that see at most X.

    queries_NT, keys_NX: flat places in (B, L); where there is no token, some place. seen: (N or 1, 1, T, X), True where
    a query sees a key; None = it sees those up to itself.
    """

    queries_NT: Tensor
    keys_NX: Tensor
    seen: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """The tokens of a batch in blocks. slots_BL: for every flat place, its place in the blocks' queries, end to end."""

    segments: Segments
    blocks: list[Block]
    slots_BL: Tensor

    @classmethod
    def of(cls, segments: Segments) -> PackedGroups:
        """Read from the segments, each of which is without gaps."""
        group_N, member_N = segments.group_BL.flatten(), segments.member_BL.flatten()
        first_N = torch.ones_like(group_N, dtype=torch.bool)
        first_N[1:] = (group_N[1:] != group_N[:-1]) | (member_N[1:] != member_N[:-1])
        starts = first_N.nonzero().flatten()
        lengths = torch.diff(starts, append=starts.new_tensor([len(group_N)]))
        prompt = (0, 0)
        sizes: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for start, length, member in zip(starts.tolist(), lengths.tolist(), member_N[starts].tolist(), strict=True):
            if member == 0:
                prompt = (start, length)
            if member >= 0:
                seen = prompt if member > 0 else (start, 0)
                # Lengths within a factor of two together: few blocks, and what is padded is less than what is there.
                sizes.setdefault((seen[1].bit_length(), length.bit_length()), []).append((*seen, start, length))
        slots_N, blocks, count = torch.zeros_like(group_N), [], 0
        for of_size in sizes.values():
            block, filled_NT = _block(torch.tensor(of_size, device=group_N.device))
            places_S = torch.arange(count, count + filled_NT.numel(), device=group_N.device).view_as(filled_NT)
            slots_N[block.queries_NT[filled_NT]] = places_S[filled_NT]
            blocks.append(block)
            count += filled_NT.numel()
        return cls(segments, blocks, slots_N)

    @property
    def keys(self) -> int:
        """Of all blocks, prompts once for every completion."""
        return sum(block.keys_NX.numel() for block in self.blocks)


def _block(spans_N4: Tensor) -> tuple[Block, Tensor]:
    """A block, and which of its queries_NT are tokens; from start and length of each prompt and each completion."""

    def places(starts_N: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.arange(int(lengths_N.max()), device=starts_N.device)
        filled = at < lengths_N[:, None]
        return (starts_N[:, None] + at).where(filled, 0), filled

    prompts_NP, in_prompt_NP = places(*spans_N4[:, :2].T)
    own_NT, filled_NT = places(*spans_N4[:, 2:].T)
    if prompts_NP.shape[1] == 0:
        return Block(own_NT, own_NT, None), filled_NT
    if bool(in_prompt_NP.all()):
        in_prompt_NP = in_prompt_NP[:1]
    tokens = own_NT.shape[1]
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=own_NT.device).tril()
    in_prompt_NTP = in_prompt_NP[:, None].expand(-1, tokens, -1)
    seen_NTX = torch.cat([in_prompt_NTP, causal_TT.expand(len(in_prompt_NP), -1, -1)], -1)
    return Block(own_NT, torch.cat([prompts_NP, own_NT], 1), seen_NTX[:, None]), filled_NT


@torch.compiler.disable
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
    if query.device.type != "cpu":
        query, key, value = in_one_precision(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        return attend_by_members(query, key, value, packed_groups, scale), None


def _attend_by_flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention as transformers calls it."""
    from transformers.integrations.flex_attention import flex_attention_forward

    states = in_one_precision(query, key, value)
    # Rows under 128 tokens would go to its kernel for decoding, which cannot be made for several queries to a key.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    return flex_attention_forward(module, *states, attention_mask, kernel_options=options, **others)


def in_one_precision(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states in autocast's precision, as SDPA casts them: rotations leave queries and keys in float32."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def asks_more(arguments: dict[str, Any]) -> bool:
    """Whether a layer hands something to its attention that may change what it is to compute."""
    return any(value is not None and name not in HARMLESS for name, value in arguments.items())


def attend_by_members(query: Tensor, key: Tensor, value: Tensor, groups: PackedGroups, scale: float) -> Tensor:
    """Attention of packed rows: queries (B, heads, L, D), keys and values (B, kv heads, L, D), to (B, L, heads, D).

    On CPUs in float32 at least: with so few queries at a time bfloat16 is slower there.
    """
    dtype, (rows, _, width, _) = query.dtype, query.shape
    if query.device.type == "cpu":
        query, key, value = (states.to(torch.promote_types(dtype, torch.float32)) for states in (query, key, value))
    given = (query, key, value, groups.blocks, scale)
    if torch.is_grad_enabled() and groups.keys > _COPIES * rows * width:
        out = checkpoint(_by_blocks, *given, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _by_blocks(*given)
    return out.index_select(0, groups.slots_BL).unflatten(0, (rows, width)).to(dtype)  # pyright: ignore


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Attention of all blocks' queries, (places, heads, D)."""

    def take(states_BHLD: Tensor, places_NT: Tensor) -> Tensor:
        """(N, H, T, D)."""
        flat = states_BHLD.transpose(1, 2).flatten(0, 1)
        return flat.index_select(0, places_NT.flatten()).unflatten(0, places_NT.shape).transpose(1, 2)

    outs = [
        grouped_attention(
            take(query, block.queries_NT),
            take(key, block.keys_NX),
            take(value, block.keys_NX),
            block.seen,
            scale,
        )
        for block in blocks
    ]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """SDPA of (N, heads, T, D) over as many key heads or fewer, under a mask or, where it is None, causally."""
    repeats = query.shape[1] // key.shape[1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if repeats > 1 and query.device.type == "cuda" and not (half and seen is None):
        # Of CUDA's kernels those without the scores in memory share no keys in float32 or under a mask.
        key, value, repeats = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), 1
    return scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=repeats > 1
    )
