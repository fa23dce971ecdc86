"""Attention over a packed group: its prompt, then its completions, each of which sees the prompt and itself.

A mask over the whole row would have every completion compared with every other: (P + kT)^2 products for a prompt of P
and k completions of T. Here the prompt attends to itself, and the completions to the prompt and to themselves:
P^2 + kT(P + T). The same sums in another order.

Covered: transformers' attention interface, SDPA, one group a row. Whatever else a model asks of its attention (windows,
soft caps, sinks, biases, dropout) goes to SDPA with the mask that says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

ATTENTION = "gvpo_packed_groups"

FOREIGN = ("softcap", "s_aux", "position_bias", "sliding_window")
"""What some models hand to their attention, and the attention of this library does not compute."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where prompts and completions are in B rows of L columns; M: most members, T: most tokens read of one.

    prompts_B: lengths. columns_BMT: flat places (b * L + column) of every completion's tokens; padding repeats some
    place of the row. sources_BL: of every column, its place in (B, P + M * T), prompts first.
    """

    prompts_B: Tensor
    columns_BMT: Tensor
    sources_BL: Tensor
    prompt_width: int

    @classmethod
    def of(cls, prompts: Sequence[int], members: Sequence[Sequence[int]], width: int, device: Any) -> GroupLayout:
        """prompts: tokens of each row's prompt; members: tokens that are read of each completion behind it."""
        longest, most = max(prompts), max(map(len, members))
        tokens = max(max(row, default=0) for row in members)
        columns = torch.zeros(len(prompts), most, tokens, dtype=torch.long)
        sources = torch.zeros(len(prompts), width, dtype=torch.long)
        stride = longest + most * tokens
        for b, (prompt, lengths) in enumerate(zip(prompts, members, strict=True)):
            columns[b] = b * width
            sources[b, :prompt] = b * stride + torch.arange(prompt)
            start = prompt
            for m, length in enumerate(lengths):
                columns[b, m, :length] = b * width + start + torch.arange(length)
                sources[b, start : start + length] = b * stride + longest + m * tokens + torch.arange(length)
                start += length
        return cls(torch.tensor(prompts, device=device), columns.to(device), sources.to(device), longest)


@contextmanager
def attending_by_groups(config: Any) -> Iterator[None]:
    """Have a model whose config this is, and which attends by SDPA, look at the layout that it is given."""
    from transformers import AttentionInterface  # late: `import gvpo` must stay light

    AttentionInterface.register(ATTENTION, _attend)
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    group_layout: GroupLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own attention."""
    from transformers import AttentionInterface

    if group_layout is None or dropout > 0 or any(others.get(name) is not None for name in FOREIGN):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, group_layout, scale), None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float) -> Tensor:
    """Attention of packed rows: queries (B, heads, L, D), keys and values (B, kv heads, L, D), to (B, L, heads, D)."""
    rows, width = layout.sources_BL.shape
    query_BHPD, key_BHPD, value_BHPD = (states[:, :, : layout.prompt_width] for states in (query, key, value))
    # What stands behind a shorter prompt is seen by what stands behind it alone.
    of_prompts = scaled_dot_product_attention(
        query_BHPD, key_BHPD, value_BHPD, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    given = (query, key, value, layout, scale)
    if torch.is_grad_enabled():
        # The scores are as many as the mask that they replace: computed again rather than kept.
        of_members = checkpoint(_of_members, *given, use_reentrant=False)
    else:
        of_members = _of_members(*given)
    together = torch.cat([of_prompts.transpose(1, 2), of_members], 1).flatten(0, 1)  # pyright: ignore
    return together.index_select(0, layout.sources_BL.flatten()).unflatten(0, (rows, width))


def _of_members(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float) -> Tensor:
    """Attention of the completions' tokens, (B, M * T, heads, D)."""
    rows, most, tokens = layout.columns_BMT.shape
    heads = key.shape[1]
    places = layout.columns_BMT.flatten()

    def of_completions(states_BHLD: Tensor) -> Tensor:
        """(B, kv heads, M, R * T, D), R: query heads per kv head."""
        chosen = states_BHLD.transpose(1, 2).flatten(0, 1).index_select(0, places)
        split = chosen.view(rows, most, tokens, heads, -1, chosen.shape[-1])
        return split.permute(0, 3, 1, 4, 2, 5).flatten(3, 4)

    query_BHMQD, key_BHMTD, value_BHMTD = map(of_completions, (query * scale, key, value))
    key_BHPD, value_BHPD = key[:, :, : layout.prompt_width], value[:, :, : layout.prompt_width]
    to_prompt = (query_BHMQD.flatten(2, 3) @ key_BHPD.transpose(-1, -2)).unflatten(2, (most, -1))
    to_own = query_BHMQD @ key_BHMTD.transpose(-1, -2)
    scores = torch.cat([to_prompt, to_own], -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(
        _hidden(layout, scores), -torch.inf
    )
    prompt_width = layout.prompt_width
    weights = scores.softmax(-1).to(value.dtype)
    out = (weights[..., :prompt_width].flatten(2, 3) @ value_BHPD).unflatten(2, (most, -1))
    out = out + weights[..., prompt_width:] @ value_BHMTD
    return out.unflatten(3, (-1, tokens)).permute(0, 2, 4, 1, 3, 5).reshape(rows, most * tokens, -1, out.shape[-1])


def _hidden(layout: GroupLayout, scores: Tensor) -> Tensor:
    """(B, 1, 1, R * T, P + T), True where a query may not look: beyond its row's prompt, and at tokens after it."""
    rows, _, tokens = layout.columns_BMT.shape
    device = scores.device
    beyond = torch.arange(layout.prompt_width, device=device) >= layout.prompts_B[:, None]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1).repeat(scores.shape[-2] // tokens, 1)
    both = [beyond[:, None].expand(rows, len(later), -1), later.expand(rows, -1, -1)]
    return torch.cat(both, -1)[:, None, None]
