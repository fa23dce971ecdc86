"""The embedded sampler: a decode loop over a causal language model, in this process, with continuous batching.

A prompt is read once for all its members; a completion that ends leaves at once, and waiting prompts take its place.
Covered: models of transformers with full attention (`shared_prefix`), any other with its own cache or without one
(`plain_reader`, where prompts wait until a batch is done), PEFT adapters (except prompt learning), the caller's
autocast. Not covered: encoder-decoder models, images, speculative decoding, `generation_config` (end tokens are an
argument).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.models.encoding import end_token_ids
from gvpo.models.modes import computes_bfloat16, evaluating
from gvpo.models.scoring import causal_lm
from gvpo.sampling.draw import draw_tokens, member_uniforms
from gvpo.sampling.plain_reader import PlainReader
from gvpo.sampling.sampler import Sample, SamplingParams, check_request
from gvpo.sampling.shared_prefix import can_share, fill_holes, gpu_positions, make_reader

_DEFAULT_BATCH_TOKENS = 32768
_GPU_BATCH_TOKENS = 262144


class TorchSampler:
    """Draws completions with the model itself, in eval mode and without gradients; every training flag is put back.

    `model`: a causal language model, on any device and in any dtype; its weights are read at every call. One with
    learned positions must accept `position_ids`. `end_token_ids`: a completion ends with
    the first of them; none = every completion is truncated. `max_batch_tokens`: the most token positions held at once:
    every live prompt once, padded to the longest, and `max_new_tokens` for every live completion (models that cannot
    share prompts hold one prompt per completion); None = 32768, or what one completion takes where that is more, and on
    a GPU up to 262144, as an eighth of its memory allows.
    `dtype`: draw with a copy of the weights in this dtype, made at every call; None = with the weights themselves.
    A model that cannot share prompts draws with its own weights, under autocast to that dtype.

    Raises UserError for a model with prompt-learning PEFT (its virtual tokens are not part of the key-value cache).
    """

    def __init__(
        self,
        model: nn.Module,
        end_token_ids: Collection[int],
        *,
        max_batch_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError("the torch sampler cannot draw from a prompt-learning PEFT model: use LoRA, or merge it")
        self.model = model
        self.end_token_ids = frozenset(end_token_ids)
        self.max_batch_tokens = max_batch_tokens
        self.dtype = dtype

    def sync(self) -> None:
        """Nothing to do: the model's own weights are read at every call."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """Draw `num_generations` completions of every prompt: see `Sampler.sample`.

        A prompt is read once for all its members, or once for each part of them where they do not fit together. Raises
        UserError for an empty prompt, counts that do not match, lengths beyond the model's positions or
        `max_batch_tokens`, or a model that gives NaN.
        """
        samples: list[list[Sample]] = [[] for _ in prompts]
        self.sample_one_by_one(prompts, num_generations, params, seeds=seeds, drawn=samples.__setitem__)
        return samples

    def sample_one_by_one(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        drawn: Callable[[int, list[Sample]], None],
    ) -> None:
        """As `sample`, each prompt's samples handed over, with its place, as soon as the last of them has ended."""
        self._check(prompts, num_generations, params, seeds)
        if not prompts:
            return
        limits = self._limits(prompts, num_generations, params)
        uniforms_PGT = torch.stack([member_uniforms(seed, num_generations, params.max_new_tokens) for seed in seeds])
        groups = [
            [_Row(index, prompt, limit, index * num_generations + g) for g, limit in enumerate(limits[index])]
            for index, prompt in enumerate(prompts)
        ]
        shares = can_share(self.model)
        # Inference mode keeps less of each tensor, and its tensors may stay nowhere in a model that is trained, nor in
        # the caller's autocast: for a copy of the weights alone.
        own_copy = shares and self.dtype is not None
        with torch.inference_mode() if own_copy else torch.no_grad(), evaluating(self.model), self._precision(shares):
            if shares:
                # A completion's last token is drawn, and not read.
                reader = make_reader(self.model, self.dtype, max(map(max, limits)) - 1)
            else:
                reader = PlainReader(self.model)
            ended = _decode(reader, groups, uniforms_PGT.flatten(0, 1), params, self.end_token_ids, self._room)
            for place in ended:
                drawn(place, [row.sample(self.end_token_ids) for row in groups[place]])

    @property
    def _room(self) -> int:
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        # A GPU's step takes hardly longer for more rows.
        return max(_DEFAULT_BATCH_TOKENS, min(_GPU_BATCH_TOKENS, gpu_positions(self.model, self.dtype)))

    def _limits(
        self, prompts: Sequence[Sequence[int]], num_generations: int, params: SamplingParams
    ) -> list[list[int]]:
        """The most tokens that each member of each prompt may take."""
        return [[params.max_new_tokens] * num_generations for _ in prompts]

    def _precision(self, shares: bool) -> AbstractContextManager[object]:
        """The caller's autocast; with a dtype, none over a copy that has it, else autocast to it."""
        device = next(self.model.parameters()).device.type
        if self.dtype is None:
            return torch.autocast(device, enabled=torch.is_autocast_enabled(device))
        if shares:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def _check(
        self, prompts: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, seeds: Sequence[int]
    ) -> None:
        check_request(prompts, num_generations, seeds)
        positions = _max_positions(self.model)
        for index, prompt in enumerate(prompts):
            row = f"prompt {index} has {len(prompt)} tokens, with max_new_tokens={params.max_new_tokens} that makes"
            total = len(prompt) + params.max_new_tokens
            if positions is not None and 0 < positions < total:
                raise UserError(
                    f"{row} {total}, more than the model's {positions} positions (max_position_embeddings): "
                    "shorten the prompt or lower max_new_tokens"
                )
            if self.max_batch_tokens is not None and total > self.max_batch_tokens:
                raise UserError(
                    f"{row} {total}, more than max_batch_tokens={self.max_batch_tokens}: "
                    "raise it, shorten the prompt or lower max_new_tokens"
                )


def make_torch_sampler(model: Any, tokenizer: Any | None, rollout_dtype: str) -> TorchSampler:
    """The sampler of a model and its tokenizer: completions end with the end tokens of either.

    rollout_dtype: "float32", "bfloat16", or "auto": bfloat16 for float32 weights where the processor computes in it,
    else the weights as they are, under the caller's autocast.
    """
    weight = next(model.parameters())
    if rollout_dtype != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[rollout_dtype]
    else:
        dtype = torch.bfloat16 if weight.dtype == torch.float32 and computes_bfloat16(weight.device) else None
    return TorchSampler(model, end_token_ids(model, tokenizer), dtype=dtype)


class Reader(Protocol):
    """What a decode loop needs of a model: rows that read token by token. joins_midway: whether beside others."""

    joins_midway: bool
    device: torch.device

    def fits(self, prompts: Sequence[int], rows: int, own: int, room: int) -> bool: ...

    def open(self, prompts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor: ...

    def read(self, tokens_N: Tensor) -> Tensor: ...

    def keep(self, rows: Sequence[int]) -> None: ...


@dataclass(slots=True)
class _Row:
    """A completion in the making: of which prompt, at most how long, and its row of uniforms."""

    group: int
    prompt: Sequence[int]
    limit: int
    uniforms: int
    part: int = 0  # of a group that is split, each with its prompt
    token_ids: list[int] = field(default_factory=list)

    def sample(self, ends: frozenset[int]) -> Sample:
        return Sample(self.token_ids, truncated=self.token_ids[-1] not in ends)


def _decode(
    reader: Reader,
    groups: Sequence[Sequence[_Row]],
    uniforms_NT: Tensor,
    params: SamplingParams,
    ends: frozenset[int],
    room: int,
) -> Iterator[int]:
    """Draw every row's tokens, in place. Yields the number of each group when all of it is drawn."""
    # MPS has no float64: there the draw, which is float64, happens on the CPU.
    uniforms_NT = uniforms_NT.to("cpu" if reader.device.type == "mps" else reader.device)
    # Prompts of one length pad each other the least.
    waiting = sorted((list(group) for group in groups), key=lambda rows: len(rows[0].prompt))[::-1]
    live: list[_Row] = []
    logits: list[Tensor] = []
    going = Counter(row.group for group in groups for row in group)
    while live or waiting:
        if parts := _next_parts(reader, live, waiting, room):
            logits.append(reader.open([rows[0].prompt for rows in parts], [len(rows) for rows in parts]))
            live += [row for rows in parts for row in rows]
        drawn_from = torch.tensor([(row.uniforms, len(row.token_ids)) for row in live]).to(uniforms_NT.device)
        tokens_N = draw_tokens(
            torch.cat(logits) if len(logits) > 1 else logits[0], uniforms_NT[*drawn_from.T], params
        ).to(reader.device)
        for row, token in zip(live, tokens_N.tolist(), strict=True):
            row.token_ids.append(token)
        going_on = [row.token_ids[-1] not in ends and len(row.token_ids) < row.limit for row in live]
        if not all(going_on):
            going -= (ended := Counter(row.group for row, goes in zip(live, going_on, strict=True) if not goes))
            yield from (group for group in ended if not going[group])
            order = fill_holes(going_on)
            live, tokens_N = [live[row] for row in order], tokens_N[order]
            reader.keep(order)
        logits = [reader.read(tokens_N)] if live else []


def _next_parts(reader: Reader, live: list[_Row], waiting: list[list[_Row]], room: int) -> list[list[_Row]]:
    """Take from what waits, last first, the groups that fit beside what is live; a part of one that fits nowhere whole.

    A group is split only where it does not fit alone.
    """
    parts: list[list[_Row]] = []
    if live and not reader.joins_midway:
        return parts
    rows = list(live)
    while waiting:
        group = waiting[-1]
        count = len(group)
        if not _fits(reader, rows, group, room):
            if rows:
                break
            count = next((n for n in range(len(group), 1, -1) if _fits(reader, rows, group[:n], room)), 1)
        parts.append(group[:count])
        rows += group[:count]
        waiting[-1] = group[count:]
        for row in waiting[-1]:
            row.part += 1
        if not waiting[-1]:
            waiting.pop()
    return parts


def _fits(reader: Reader, rows: Sequence[_Row], more: Sequence[_Row], room: int) -> bool:
    together = [*rows, *more]
    prompts = {(row.group, row.part): len(row.prompt) for row in together}
    return reader.fits(list(prompts.values()), len(together), max(row.limit for row in together), room)


def _max_positions(model: nn.Module) -> int | None:
    config = getattr(causal_lm(model), "config", None)
    return None if config is None else getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
