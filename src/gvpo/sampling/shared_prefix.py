"""Decoding with the prompt read and kept once per group: an attention function that has its own memory.

A completion's next token attends to its prompt, kept once for all members, and to its own tokens. The two attentions
are computed apart and joined by their log-sum-exps, which is exact: softmax over a union of keys is the average of the
softmaxes over its parts, weighted by their masses. A prompt of P tokens with k completions of T then takes P + k * T
places of memory instead of k * (P + T), and reading it is a matrix product over the members instead of k products
with a vector.

Covered: models of transformers whose attention goes through the attention interface, every layer over all past tokens.
Not covered: windows, recurrent layers, soft caps, sinks and position biases within attention; `can_share` tells. Nor
what it cannot tell: rope_type "longrope" beyond the length first trained with, where frequencies change midway.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gvpo.models.head import head_maker
from gvpo.models.modes import probing
from gvpo.models.packed_attention import asks_more, grouped_attention, reaches_attention
from gvpo.models.scoring import attends_to_all, causal_lm
from gvpo.sampling.packed_linear import pack_linears

ATTENTION = "gvpo_shared_prefix"

_TOLERANCE = 1e-4
_BLOCK = 64

_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Unsupported(Exception):
    """A model asks its attention for something that is not computed here."""


def reading_copy(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A structural copy of a model in evaluation mode that attends by shared prefixes.

    dtype None: it has the model's own parameters, not copies of them. Else they are cast, and on CPUs packed for linear
    layers; buffers, such as rotary frequencies, keep their precision.
    """

    def cast(parameter: nn.Parameter) -> nn.Parameter:
        if dtype is None or not parameter.is_floating_point():
            return parameter
        return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)

    with _Detaching():
        reader = copy.deepcopy(model, {id(parameter): cast(parameter) for parameter in model.parameters()})
    if dtype is not None:
        pack_linears(reader)
    reader.config._attn_implementation = ATTENTION
    return reader.eval()


class _Detaching(TorchFunctionMode):
    """Deep copies of tensors that have a graph, such as what a hook has kept of the last forward, leave it behind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@dataclass(slots=True)
class _Layer:
    """Keys and values of one layer: of the prompts (G, H, P, D), and of the completions' own tokens (N, H, T, D)."""

    prompts: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)


class SharedPrefixReader:
    """Rows that read token by token, each after a prompt that it shares with others.

    Rows and prompts are numbered without gaps, so that what is live is always the front of every buffer. model: what
    `reading_copy` returned; head: hidden states (N, D) to logits (N, V). most_own: the most tokens of its own that a
    row reads, for which memory is taken; None = not known.
    """

    joins_midway = True

    def __init__(self, model: Any, head: Any, most_own: int | None = None) -> None:
        _register()
        self.model, self.head, self.most_own = model, head, most_own
        self.device = next(model.parameters()).device
        self._layers: dict[int, _Layer] = {}
        self._prompts: list[int] = []  # length of each prompt
        self._owner: list[int] = []  # each row's prompt
        self._read: list[int] = []  # own tokens that each row has read
        self._step = _Step()

    def fits(self, prompts: Sequence[int], rows: int, own: int, room: int) -> bool:
        """Whether prompts of these lengths, and rows of so many own tokens, take no more than `room` positions."""
        return len(prompts) * max(prompts) + rows * own <= room

    def open(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
        """Read prompts, and append so many rows to each. Returns the logits_NV of the new rows' first tokens."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        # Padding comes last, where no real token sees it.
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        self._step = _Step(
            prompts_before=len(self._prompts),
            prompt_width=max([width, *self._prompts]),
            rows=len(self._owner) + sum(sizes),
        )
        hidden_GPD = self._forward(ids, torch.arange(width, device=self.device).expand_as(ids))
        last_G = torch.tensor(lengths, device=self.device) - 1
        logits_GV = self.head(hidden_GPD[torch.arange(len(prompts), device=self.device), last_G])
        first = len(self._prompts)
        self._prompts += lengths
        self._owner += [first + number for number, size in enumerate(sizes) for _ in range(size)]
        self._read += [0] * sum(sizes)
        return logits_GV.repeat_interleave(torch.tensor(sizes, device=logits_GV.device), 0)

    def read(self, tokens_N: Tensor) -> Tensor:
        """Read one token for every row. Returns the logits_NV that follow."""
        self._step = self._next_step()
        positions = [self._prompts[owner] + read for owner, read in zip(self._owner, self._read, strict=True)]
        hidden_N1D = self._forward(tokens_N[:, None], torch.tensor(positions, device=self.device)[:, None])
        self._read = [read + 1 for read in self._read]
        return self.head(hidden_N1D[:, 0])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; prompts that have none left go."""
        left = {self._owner[row] for row in rows}
        order = fill_holes([prompt in left for prompt in range(len(self._prompts))])
        for layer in self._layers.values():
            _move(layer.prompts, order)
            _move(layer.own, rows)
        place = {prompt: number for number, prompt in enumerate(order)}
        self._prompts = [self._prompts[prompt] for prompt in order]
        self._owner = [place[self._owner[row]] for row in rows]
        self._read = [self._read[row] for row in rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, shared_prefix=self)
        return output.last_hidden_state

    def _next_step(self) -> _Step:
        members: list[list[int]] = [[] for _ in self._prompts]
        for row, owner in enumerate(self._owner):
            members[owner].append(row)
        most = max(map(len, members))
        slots = [rows + [0] * (most - len(rows)) for rows in members]
        place = {row: g * most + n for g, rows in enumerate(members) for n, row in enumerate(rows)}

        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, device=self.device)

        own_width = max(self._read) + 1
        own_places = -(-own_width // _BLOCK) * _BLOCK
        if self.most_own is not None:
            own_places = max(own_width, min(own_places, self.most_own))
        return _Step(
            reads_prompts=False,
            rows_GM=tensor(slots),
            places_N=tensor([place[row] for row in range(len(self._owner))]),
            own_N=tensor(self._read),
            own_width=own_width,
            own_places=own_places,
            hidden_own=_hidden(tensor(self._read) + 1, own_width),
            hidden_prompt=_hidden(tensor(self._prompts), max(self._prompts)),
            prompt_width=max(self._prompts),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer: queries (B, heads, L, D), new keys and values (B, kv heads, L, D)."""
        held, step = self._layers.setdefault(layer, _Layer()), self._step
        if step.reads_prompts:
            _put_prompts(held, step, key, value)
            return grouped_attention(query, key, value, None, scale)
        rows, heads = query.shape[0], key.shape[1]
        _put_own(held, step, key, value)
        query_NHRD = query.reshape(rows, heads, -1, query.shape[-1])
        keys, values = (one[:rows, :, : step.own_width] for one in held.own)
        own, own_mass = _attention(query_NHRD, keys, values, scale, step.hidden_own)
        groups, most = step.rows_GM.shape
        query_GMHRD = query_NHRD[step.rows_GM]
        query_GHRD = query_GMHRD.transpose(1, 2).flatten(2, 3)
        keys, values = (one[:groups, :, : step.prompt_width] for one in held.prompts)
        shared, shared_mass = _attention(query_GHRD, keys, values, scale, step.hidden_prompt)

        def by_row(values_GHRX: Tensor) -> Tensor:
            return values_GHRX.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1)[step.places_N]

        weight = torch.sigmoid(own_mass - by_row(shared_mass))
        joined = torch.lerp(by_row(shared), own, weight)
        return joined.to(query.dtype).reshape(rows, query.shape[1], 1, -1)


@dataclass(slots=True)
class _Step:
    """What every layer needs in one forward: whether prompts are read, and else who sees what."""

    reads_prompts: bool = True
    prompts_before: int = 0
    rows: int = 0
    rows_GM: Tensor = field(default_factory=lambda: torch.empty(0))
    places_N: Tensor = field(default_factory=lambda: torch.empty(0))
    own_N: Tensor = field(default_factory=lambda: torch.empty(0))
    own_width: int = 0
    own_places: int = 0
    hidden_own: Tensor | None = None
    hidden_prompt: Tensor | None = None
    prompt_width: int = 0


def fill_holes(kept: Sequence[bool]) -> list[int]:
    """The places that are kept, so ordered that few move: those from the end take the places of those that go."""
    count = sum(kept)
    movers = iter([place for place in range(count, len(kept)) if kept[place]])
    return [place if kept[place] else next(movers) for place in range(count)]


def can_share(model: nn.Module) -> bool:
    """Whether this model decodes by shared prefixes, and gives what it gives otherwise: measured once per model."""
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        return False
    causal = causal_lm(model)
    if model not in _known:
        may = reaches_attention(causal) and attends_to_all(causal)
        _known[model] = may and head_maker(causal) is not None and _is_exact(causal)
    return _known[model]


def make_reader(model: nn.Module, dtype: torch.dtype | None, most_own: int | None = None) -> SharedPrefixReader:
    """A reader for a model that can share; dtype: of its own copy of the weights, None = the model's weights.

    most_own: see SharedPrefixReader.
    """
    causal = causal_lm(model)
    make = head_maker(causal)
    assert make is not None
    reader = reading_copy(causal, dtype)
    return SharedPrefixReader(reader, make(reader), most_own)


def gpu_positions(model: nn.Module, dtype: torch.dtype | None) -> int:
    """How many positions' keys and values fill an eighth of the model's GPU; 0 = it is on none, or tells no sizes."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return 0
    config = getattr(causal_lm(model), "config", None)
    text: Any = None if config is None else config.get_text_config(decoder=True)
    queries = getattr(text, "num_attention_heads", None)
    heads = getattr(text, "num_key_value_heads", None) or queries
    sizes: list[Any] = [getattr(text, "num_hidden_layers", None), heads, queries, getattr(text, "hidden_size", None)]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return 0
    layers, heads, queries, hidden = sizes
    width = getattr(text, "head_dim", None) or hidden // queries
    held = torch.cuda.get_device_properties(weight.device).total_memory // 8
    return held // (2 * layers * heads * width * (dtype or weight.dtype).itemsize)


def _is_exact(causal: Any) -> bool:
    """Two prompts of different lengths with two rows each, one of which leaves, against plain forwards."""
    vocabulary = len(causal.get_input_embeddings().weight)
    prompts = [[token % vocabulary for token in tokens] for tokens in ((3, 1, 4, 1, 5), (9, 2))]
    tokens = [[token % vocabulary for token in row] for row in ((6, 5), (3, 5), (8, 9), (7, 9))]
    with probing(causal):
        reader = make_reader(causal, None)
        try:
            reader.open(prompts, [2, 2])
            reader.read(torch.tensor([row[0] for row in tokens], device=reader.device))
            reader.keep([3, 1, 2])
            ours = reader.read(torch.tensor([tokens[row][1] for row in (3, 1, 2)], device=reader.device))
        except Unsupported:
            return False
        owners = (1, 0, 1)
        for logits_V, row, prompt in zip(ours, (3, 1, 2), owners, strict=True):
            ids = torch.tensor([prompts[prompt] + tokens[row]], device=reader.device)
            own_V = causal(input_ids=ids, use_cache=False).logits[0, -1]
            limit = _TOLERANCE if own_V.dtype in (torch.float32, torch.float64) else 0.05
            if not (logits_V - own_V).abs().max() <= limit * own_V.abs().max():
                return False
    return True


def _register() -> None:
    from transformers import AttentionInterface  # late: `import gvpo` must stay light

    AttentionInterface.register(ATTENTION, _attend)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: SharedPrefixReader | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own attention."""
    # Without a number a layer's keys have no place of their own.
    numbered = getattr(module, "layer_idx", None) is not None
    if shared_prefix is None or attention_mask is not None or dropout > 0 or asks_more(others) or not numbered:
        raise Unsupported
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prefix.attend(module.layer_idx, query, key, value, scale).transpose(1, 2).contiguous(), None


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention (..., R, D), and the log-sum-exp (..., R, 1) of its scores; at least float32."""
    scores = (query * scale) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    masses = scores.sub_(largest).exp_()
    total = masses.sum(-1, keepdim=True)
    return (masses.to(value.dtype) @ value) / total, largest + total.log()


def _hidden(lengths: Tensor, width: int) -> Tensor | None:
    """(B, 1, 1, width), True beyond each length; None where nothing is."""
    beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return beyond[:, None, None] if bool(beyond.any()) else None


def _put_prompts(held: _Layer, step: _Step, key: Tensor, value: Tensor) -> None:
    before, width = step.prompts_before, key.shape[2]
    rows = before + len(key)
    # Both are cut to what lives now: what many short prompts once took is not kept for a few long ones.
    held.prompts = _sized(held.prompts, rows, step.prompt_width, key, value)
    if held.own:
        held.own = _sized(held.own, min(len(held.own[0]), step.rows), held.own[0].shape[2], key, value)
    for one, new in zip(held.prompts, (key, value), strict=True):
        one[before:rows, :, :width] = new


def _put_own(held: _Layer, step: _Step, key: Tensor, value: Tensor) -> None:
    rows = torch.arange(len(key), device=key.device)
    now = (len(held.own[0]), held.own[0].shape[2]) if held.own else (0, 0)
    held.own = _sized(held.own, max(now[0], len(key)), max(now[1], step.own_places), key, value)
    for one, new in zip(held.own, (key, value), strict=True):
        one[rows, :, step.own_N] = new[:, :, 0]


def _sized(buffers: list[Tensor], rows: int, places: int, *like: Tensor) -> list[Tensor]:
    """Buffers of so many rows and places, with what they held at their front; like: new states to be put in them."""
    if buffers and (len(buffers[0]), buffers[0].shape[2]) == (rows, places):
        return buffers
    sized = [one.new_zeros(rows, one.shape[1], places, one.shape[3]) for one in like]
    for new, old in zip(sized, buffers, strict=False):
        kept = old[:rows, :, :places]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
    return sized


def _move(buffers: list[Tensor], order: Sequence[int]) -> None:
    """Put the rows named at the front, in this order."""
    for buffer in buffers:
        # Rows beyond the buffer have joined and read nothing yet.
        moved = [(place, row) for place, row in enumerate(order) if place != row < len(buffer)]
        if moved:
            to, source = map(list, zip(*moved, strict=True))
            buffer[to] = buffer[source]
