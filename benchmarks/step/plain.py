"""What one writes by hand: model.generate, a padded forward of every completion with its prompt, AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from cases import Case
from forced import check_lengths, force_generate, make_model, make_prompts, reward
from torch import Tensor

MICRO_BATCH = 8
BETA = 0.1


def run_plain(case: Case, setting: str, count: int, loaded: Callable[[], None]) -> list[dict[str, float]]:
    """`count` steps; seconds of each part. loaded: called when the model is."""
    model, tokenizer = make_model(case)
    _, prompts = make_prompts(case, tokenizer)
    force_generate(model, case, prompts, [tokenizer.eos_token_id])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rows_NT = torch.tensor(prompts).repeat_interleave(case.k, 0)
    loaded()
    steps = []
    for _ in range(count):
        times = [time.perf_counter()]
        with autocast(setting):
            sequences_NT = sample(model, rows_NT, case.max_tokens, tokenizer.pad_token_id)
        times.append(time.perf_counter())
        completions, mask_NT = cut(sequences_NT[:, case.prompt_tokens :], tokenizer.eos_token_id)
        check_lengths(case, completions)
        weights_N = group_weights(torch.tensor(reward(completions)), case.k)
        times.append(time.perf_counter())
        update(model, optimizer, sequences_NT, mask_NT, weights_N, setting)
        times.append(time.perf_counter())
        parts = [end - start for start, end in pairwise(times)]
        steps.append(dict(zip(("sampling", "scoring", "update"), parts, strict=True)) | {"whole": sum(parts)})
    return steps


def autocast(setting: str) -> Any:
    """bf16 for the block, where the setting says so."""
    return torch.autocast("cpu", torch.bfloat16) if setting == "bf16" else nullcontext()


def sample(model: Any, rows_NT: Tensor, max_tokens: int, pad_id: int) -> Tensor:
    """Prompt and completion of every row, padded behind the end token."""
    model.eval()
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_tokens, "pad_token_id": pad_id}
    return model.generate(rows_NT, attention_mask=torch.ones_like(rows_NT), **options)


def cut(tokens_NT: Tensor, end_id: int) -> tuple[list[list[int]], Tensor]:
    """Completions up to their first end token, and the mask of what is kept."""
    is_end_NT = tokens_NT == end_id
    mask_NT = is_end_NT.cumsum(1) - is_end_NT.int() == 0
    return [row[kept].tolist() for row, kept in zip(tokens_NT, mask_NT, strict=True)], mask_NT


def group_weights(rewards_N: Tensor, k: int) -> Tensor:
    """GVPO's gradient with respect to log-probs where the policy is its own reference: centred rewards, scaled."""
    rewards_PG = rewards_N.view(-1, k)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (-BETA / (k - 1) / len(rewards_PG) * centred_PG).flatten()


def update(model: Any, optimizer: Any, sequences_NT: Tensor, mask_NT: Tensor, weights_N: Tensor, setting: str) -> None:
    """One optimizer step over all completions, micro-batch by micro-batch."""
    model.train()
    prompt_tokens = sequences_NT.shape[1] - mask_NT.shape[1]
    whole_NT = torch.cat([torch.ones_like(sequences_NT[:, :prompt_tokens], dtype=torch.bool), mask_NT], 1)
    for start in range(0, len(sequences_NT), MICRO_BATCH):
        rows = slice(start, start + MICRO_BATCH)
        with autocast(setting):
            logits_NTV = model(sequences_NT[rows], attention_mask=whole_NT[rows].long()).logits
        logps_NTV = logits_NTV[:, prompt_tokens - 1 : -1].float().log_softmax(-1)
        logps_NT = logps_NTV.gather(-1, sequences_NT[rows, prompt_tokens:, None]).squeeze(-1)
        logps_N = (logps_NT * mask_NT[rows]).sum(1)
        (weights_N[rows] * logps_N).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
