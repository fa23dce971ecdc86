"""Decoding with the cache that the model brings: one row per completion, its prompt repeated for every member.

For models that do not decode by shared prefixes: recurrent layers, windows, attention of their own, no cache at all
(slowly: the whole sequence is read again for every token).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.models.scoring import causal_lm


class PlainReader:
    """Rows that read token by token, left-padded, with the cache where the model has one; the model as it is."""

    joins_midway = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.names, self.takes_any = _forward_arguments(model)
        self.ragged = _exact_under_padding(model)
        self._begin(0)

    def fits(self, prompts: Sequence[int], rows: int, own: int, room: int) -> bool:
        """Whether rows of these prompts and so many own tokens can be one batch of at most `room` positions."""
        return (self.ragged or len(set(prompts)) == 1) and rows * (max(prompts) + own) <= room

    def open(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
        """Read prompts, and make so many rows of each. Returns the logits_NV of the rows' first tokens."""
        assert len(self.ids_NT) == 0, "rows cannot join others"
        self._begin(len(prompts))
        logits_PV = self._forward(*_left_padded(prompts, self.device))
        owners_N = torch.repeat_interleave(torch.tensor(sizes, device=self.device))
        self._select(owners_N)
        return logits_PV[owners_N.to(logits_PV.device)]

    def read(self, tokens_N: Tensor) -> Tensor:
        """Read one token for every row. Returns the logits_NV that follow."""
        return self._forward(tokens_N[:, None], torch.ones_like(tokens_N)[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._select(torch.tensor(rows, dtype=torch.long, device=self.device))

    def _begin(self, rows: int) -> None:
        self.ids_NT = torch.empty((rows, 0), dtype=torch.long, device=self.device)
        self.mask_NT = torch.empty((rows, 0), dtype=torch.long, device=self.device)
        self.cache: Any = None

    def _forward(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Append tokens (mask 1 = real, 0 = padding) and return the logits_NV that follow the last."""
        self.ids_NT = torch.cat([self.ids_NT, ids_NT], -1)
        self.mask_NT = torch.cat([self.mask_NT, mask_NT], -1)
        unread = self.ids_NT.shape[-1] if self.cache is None else ids_NT.shape[-1]
        optional = {
            "position_ids": (self.mask_NT.cumsum(-1) - 1).clamp(min=0)[:, -unread:],
            "logits_to_keep": 1,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        output = self.model(
            input_ids=self.ids_NT[:, -unread:],
            attention_mask=None if self.mask_NT.all() else self.mask_NT,
            **{name: value for name, value in optional.items() if self.takes_any or name in self.names},
        )
        cache = getattr(output, "past_key_values", None)
        # A cache that cannot follow its rows is not used: the whole sequence is read again, which is always right.
        self.cache = cache if hasattr(cache, "reorder_cache") else None
        return output.logits[:, -1]

    def _select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is repeated."""
        self.ids_NT, self.mask_NT = self.ids_NT[rows_N], self.mask_NT[rows_N]
        if self.cache is not None and len(rows_N):
            # The one selection that every kind of cache layer has: batch_select_indices and batch_repeat_interleave
            # forget the recurrent states of hybrid layers.
            self.cache.reorder_cache(rows_N)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids_PT and mask_PT (1 = real, 0 = padding). Id 0 pads: under the mask any id would do."""
    width = max(len(prompt) for prompt in prompts)
    ids_PT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_PT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids_PT, mask_PT


def _forward_arguments(model: nn.Module) -> tuple[set[str], bool]:
    """The argument names of the model's forward, and whether it takes any other by `**kwargs`."""
    parameters = inspect.signature(causal_lm(model).forward).parameters
    return set(parameters), any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _exact_under_padding(model: nn.Module) -> bool:
    """Whether prompts of different lengths may share a batch.

    Yes for plain attention over all past tokens with explicit positions: masked padding then has no effect at all.
    Recurrent states, windows and unknown caches would need care about what padding leaves behind; there, only prompts
    of one length share a batch.
    """
    config = getattr(causal_lm(model), "config", None)
    names, _ = _forward_arguments(model)
    if config is None or "position_ids" not in names:
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer  # late: `import gvpo` must stay light

    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return all(type(layer) is DynamicLayer for layer in layers)
