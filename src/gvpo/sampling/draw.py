"""From logits to a token: temperature, top-k, top-p, and the inverse-CDF draw. Pure functions, no model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from gvpo.errors import UserError
from gvpo.sampling.sampler import SamplingParams

# The vocabulary is summed in blocks of this many tokens, then one block is searched.
_BLOCK = 256
# A nucleus is looked for among this many tokens first: sorting a whole vocabulary costs as much as a small model.
_TOP_P_CANDIDATES = 1024
# On a CPU rows are drawn in chunks of this many logits: the passes over them then find them in its cache.
_CHUNK_ELEMENTS = 2**20
# The largest float64 below 1. x * this is below x for every normal x, so a target never reaches the total mass.
_BELOW_ONE = 1 - 2**-53


def member_uniforms(seed: int, num_generations: int, max_new_tokens: int) -> Tensor:
    """The uniforms_GT that a prompt's members draw with: member g's t-th token comes from entry (g, t).

    Returns float64 numbers in [0, 1) on the CPU. `seed`: any integer. Members keep their rows when `num_generations`
    grows.
    """
    # torch's CPU generator reads the low 32 bits only: without the hash, seeds that differ above them would draw alike.
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand((num_generations, max_new_tokens), dtype=torch.float64, generator=generator)


def draw_tokens(logits_NV: Tensor, uniforms_N: Tensor, params: SamplingParams) -> Tensor:
    """Draw one token per row: argmax at temperature 0, else the inverse CDF of the filtered distribution.

    `logits_NV`: any floating dtype, computed in float32 at least; -inf = never. `uniforms_N`: float64 in [0, 1).
    Returns int64 tokens_N, on the device of the uniforms. Raises UserError if a row holds NaN or +inf, or nothing
    but -inf.
    """
    on_cpu = uniforms_N.device.type == "cpu"
    rows = max(1, _CHUNK_ELEMENTS // logits_NV.shape[-1] if on_cpu else len(logits_NV))
    chunks = zip(logits_NV.split(rows), uniforms_N.split(rows), strict=True)
    return torch.cat([_draw_chunk(logits, uniforms, params) for logits, uniforms in chunks])


def _draw_chunk(logits_NV: Tensor, uniforms_N: Tensor, params: SamplingParams) -> Tensor:
    logits_NV = logits_NV.to(uniforms_N.device, torch.promote_types(logits_NV.dtype, torch.float32))
    # amax hands NaN on, so one pass finds every row that has no distribution.
    if not torch.isfinite(logits_NV.amax(-1)).all():
        raise UserError(
            "the model gives NaN or infinite logits: its weights are broken, or have diverged (lower learning_rate)"
        )
    if params.temperature == 0:
        return logits_NV.argmax(-1)
    return inverse_cdf(filter_logits(logits_NV, params), uniforms_N)


def filter_logits(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """Apply temperature (above 0), then top-k, then top-p; what they leave out becomes -inf.

    Each row is shifted so that its largest entry is 0. Tokens that tie with the last one kept are kept too, so the set
    never depends on how a sort breaks ties; the most likely token always stays.
    """
    # Shifted before the division: a small temperature must not overflow the largest logit.
    scaled_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    if params.temperature != 1:
        scaled_NV.div_(params.temperature)
    if 0 < params.top_k < scaled_NV.shape[-1]:
        scaled_NV.masked_fill_(scaled_NV < scaled_NV.topk(params.top_k).values[:, -1:], -torch.inf)
    if params.top_p < 1:
        scaled_NV.masked_fill_(scaled_NV < _top_p_cutoff(scaled_NV, params.top_p), -torch.inf)
    return scaled_NV


def _top_p_cutoff(logits_NV: Tensor, top_p: float, candidates: int = _TOP_P_CANDIDATES) -> Tensor:
    """The smallest logit of each row's nucleus, as cutoffs_N1; rows must have a largest entry of 0."""
    vocabulary = logits_NV.shape[-1]
    top_NK = logits_NV.topk(min(candidates, vocabulary)).values
    mass_NK = top_NK.double().exp() / logits_NV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    kept_NK = mass_NK.cumsum(-1) - mass_NK < top_p
    if candidates < vocabulary and kept_NK[:, -1].any():
        return _top_p_cutoff(logits_NV, top_p, vocabulary)
    return top_NK.masked_fill(~kept_NK, torch.inf).amin(-1, keepdim=True)


def inverse_cdf(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The token at which each row's cumulative probability first exceeds its uniform, as int64 tokens_N.

    `logits_NV`: float32 or float64, each row with a largest entry of 0. `uniforms_N`: float64 in [0, 1). A token of
    probability zero is never returned. Masses are added up in float64, by blocks and then within one block: the same
    numbers as one float64 cumulative sum over the vocabulary, several times faster.
    """
    mass_NV = logits_NV.exp()
    if short := -mass_NV.shape[-1] % _BLOCK:
        mass_NV = pad(mass_NV, (0, short))
    mass_NBK = mass_NV.unflatten(-1, (-1, _BLOCK))
    block_mass_NB = mass_NBK.sum(-1, dtype=torch.float64)
    block_N, rest_N = _locate(block_mass_NB, uniforms_N * block_mass_NB.sum(-1))
    mass_NK = mass_NBK[torch.arange(len(block_N), device=block_N.device), block_N].double()
    index_N, _ = _locate(mass_NK, rest_N)
    return block_N * _BLOCK + index_N


def _locate(mass_NK: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first cell with mass whose cumulative mass exceeds the target, and what is left of the target in it."""
    # No searchsorted: a parallel cumulative sum may step at a cell without mass, or end off the sum by a rounding.
    cdf_NK = torch.where(mass_NK > 0, mass_NK.cumsum(-1), 0.0)
    target_N1 = torch.minimum(target_N, cdf_NK.amax(-1) * _BELOW_ONE).unsqueeze(-1)
    cell_N1 = (cdf_NK > target_N1).to(torch.uint8).argmax(-1, keepdim=True)
    before_N1 = cdf_NK.gather(-1, cell_N1) - mass_NK.gather(-1, cell_N1)
    return cell_N1.squeeze(-1), (target_N1 - before_N1).clamp(min=0).squeeze(-1)
