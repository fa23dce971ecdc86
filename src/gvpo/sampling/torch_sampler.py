"""The embedded sampler: a decode loop over a Hugging Face causal language model, in this process.

Covered: models with a key-value cache of any layer kind, models without one (slowly: the whole sequence is read again
for every token), PEFT adapters (except prompt learning), the caller's autocast. Not covered: encoder-decoder models,
images, continuous batching, speculative decoding, `generation_config` (end tokens are an argument).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.models.modes import evaluating
from gvpo.sampling.draw import draw_tokens, member_uniforms
from gvpo.sampling.sampler import Sample, SamplingParams

_DEFAULT_BATCH_TOKENS = 32768


class TorchSampler:
    """Draws completions with the model itself, in eval mode and without gradients; every training flag is put back.

    `model`: a causal language model, on any device and in any dtype; its weights are read at every call. One with
    learned positions must accept `position_ids`. `end_token_ids`: a completion ends with
    the first of them; none = every completion is truncated. `max_batch_tokens`: the most rows * (longest prompt +
    max_new_tokens) in one decode batch; None = 32768, or one row where a row is longer.

    Raises UserError for a model with prompt-learning PEFT (its virtual tokens are not part of the key-value cache).
    """

    def __init__(
        self, model: nn.Module, end_token_ids: Collection[int], *, max_batch_tokens: int | None = None
    ) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError("the torch sampler cannot draw from a prompt-learning PEFT model: use LoRA, or merge it")
        self.model = model
        self.end_token_ids = frozenset(end_token_ids)
        self.max_batch_tokens = max_batch_tokens

    def sync(self) -> None:
        """Nothing to do: the model's own weights are read at every call."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        *,
        seeds: Sequence[int],
    ) -> list[list[Sample]]:
        """Draw `num_generations` completions of every prompt: see `Sampler.sample`.

        A prompt is read once for all its members, or once a batch where they do not fit one. Raises UserError for an
        empty prompt, counts that do not match, lengths beyond the model's positions or `max_batch_tokens`, or a model
        that gives NaN.
        """
        self._check(prompts, num_generations, params, seeds)
        samples: list[list[Sample]] = [[] for _ in prompts]
        batches = plan_decoding(
            [len(prompt) for prompt in prompts],
            num_generations,
            params.max_new_tokens,
            max_batch_tokens=self.max_batch_tokens or _DEFAULT_BATCH_TOKENS,
            ragged=_exact_under_padding(self.model),
        )
        shape = num_generations, params.max_new_tokens
        with evaluating(self.model):
            for batch in batches:
                uniforms_NT = torch.cat([member_uniforms(seeds[p], *shape)[list(members)] for p, members in batch])
                sizes_P = [len(members) for _, members in batch]
                rows = self._decode([prompts[p] for p, _ in batch], sizes_P, uniforms_NT, params)
                owners = [p for p, members in batch for _ in members]
                for prompt, token_ids in zip(owners, rows, strict=True):
                    samples[prompt].append(Sample(token_ids, truncated=token_ids[-1] not in self.end_token_ids))
        return samples

    def _check(
        self, prompts: Sequence[Sequence[int]], num_generations: int, params: SamplingParams, seeds: Sequence[int]
    ) -> None:
        if num_generations < 1:
            raise UserError(f"num_generations is {num_generations}: give at least 1")
        if len(seeds) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
        positions = _max_positions(self.model)
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {index} has no tokens: give at least one (the BOS token, say)")
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

    def _decode(
        self, prompts: Sequence[Sequence[int]], sizes_P: list[int], uniforms_NT: Tensor, params: SamplingParams
    ) -> list[list[int]]:
        """The completions of one batch, prompt by prompt and member by member."""
        context = _Context(self.model, len(prompts))
        logits_PV = context.read(*_left_padded(prompts, context.device))
        owners_N = torch.repeat_interleave(torch.tensor(sizes_P, device=context.device))
        context.select(owners_N)
        logits_NV = logits_PV[owners_N.to(logits_PV.device)]
        # MPS has no float64: there the draw, which is float64, happens on the CPU.
        uniforms_NT = uniforms_NT.to("cpu" if context.device.type == "mps" else context.device)

        completions: list[list[int]] = [[] for _ in range(len(uniforms_NT))]
        live = list(range(len(completions)))  # the completion that each row of the batch belongs to
        for step in range(params.max_new_tokens):
            tokens_N = draw_tokens(logits_NV, uniforms_NT[live, step], params).to(context.device)
            for completion, token in zip(live, tokens_N.tolist(), strict=True):
                completions[completion].append(token)
            going_on = [
                row for row, completion in enumerate(live) if completions[completion][-1] not in self.end_token_ids
            ]
            if not going_on or step + 1 == params.max_new_tokens:
                break
            if len(going_on) < len(live):
                live = [live[row] for row in going_on]
                rows_N = torch.tensor(going_on, device=context.device)
                context.select(rows_N)
                tokens_N = tokens_N[rows_N]
            logits_NV = context.read(tokens_N.unsqueeze(-1))
        return completions


def plan_decoding(
    lengths_P: Sequence[int], num_generations: int, max_new_tokens: int, *, max_batch_tokens: int, ragged: bool
) -> list[list[tuple[int, range]]]:
    """Split P prompts into decode batches of (prompt, its members), by increasing prompt length.

    A batch holds at most max_batch_tokens // (its longest prompt + max_new_tokens) rows, or one. A group is split only
    where it does not fit one batch. `ragged` False: only prompts of one length share a batch.
    """
    batches: list[list[tuple[int, range]]] = []
    for prompt in sorted(range(len(lengths_P)), key=lengths_P.__getitem__):
        room = max(max_batch_tokens // (lengths_P[prompt] + max_new_tokens), 1)
        for start in range(0, num_generations, room):
            members = range(start, min(start + room, num_generations))
            last = batches[-1] if batches else []
            rows = sum(len(others) for _, others in last)
            fits = rows + len(members) <= room and (ragged or all(lengths_P[p] == lengths_P[prompt] for p, _ in last))
            if last and fits:
                last.append((prompt, members))
            else:
                batches.append([(prompt, members)])
    return batches


class _Context:
    """What the model has read so far: one row per completion, left-padded, with the cache where the model has one."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.names, self.takes_any = _forward_arguments(model)
        self.ids_NT = torch.empty((rows, 0), dtype=torch.long, device=self.device)
        self.mask_NT = torch.empty((rows, 0), dtype=torch.long, device=self.device)
        self.padded = False
        self.cache: Any = None

    def read(self, ids_NT: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """Append tokens (mask 1 = real, 0 = padding; None = all real) and return the logits_NV that follow the last."""
        if mask_NT is None:
            mask_NT = torch.ones_like(ids_NT)
        elif not mask_NT.all():
            self.padded = True
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
            attention_mask=self.mask_NT if self.padded else None,
            **{name: value for name, value in optional.items() if self.takes_any or name in self.names},
        )
        cache = getattr(output, "past_key_values", None)
        # A cache that cannot follow its rows is not used: the whole sequence is read again, which is always right.
        self.cache = cache if hasattr(cache, "reorder_cache") else None
        return output.logits[:, -1]

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order; a row named twice is repeated."""
        self.ids_NT, self.mask_NT = self.ids_NT[rows_N], self.mask_NT[rows_N]
        if self.cache is not None:
            # The one selection that every kind of cache layer has: batch_select_indices and batch_repeat_interleave
            # forget the recurrent states of hybrid layers.
            self.cache.reorder_cache(rows_N)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids_PT and mask_PT (1 = real, 0 = padding). Id 0 pads: under the mask any id would do."""
    width = max(len(prompt) for prompt in prompts)
    ids_PT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_PT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids_PT, mask_PT


def _base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose own forward shows no argument names."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(_base_model(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def _max_positions(model: nn.Module) -> int | None:
    return getattr(_text_config(model), "max_position_embeddings", None)


def _forward_arguments(model: nn.Module) -> tuple[set[str], bool]:
    """The argument names of the model's forward, and whether it takes any other by `**kwargs`."""
    parameters = inspect.signature(_base_model(model).forward).parameters
    return set(parameters), any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _exact_under_padding(model: nn.Module) -> bool:
    """Whether prompts of different lengths may share a batch.

    Yes for plain attention over all past tokens with explicit positions: masked padding then has no effect at all.
    Recurrent states, windows and unknown caches would need care about what padding leaves behind; there, only prompts
    of one length share a batch.
    """
    config = _text_config(model)
    names, _ = _forward_arguments(model)
    if config is None or "position_ids" not in names:
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer  # late: `import gvpo` must stay light

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
