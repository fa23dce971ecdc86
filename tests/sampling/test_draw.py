"""The draw against hand-made distributions, a plain float64 inverse CDF, and transformers' own warpers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gvpo.errors import UserError
from gvpo.sampling import SamplingParams
from gvpo.sampling.draw import draw_tokens, filter_logits, inverse_cdf, member_uniforms

LARGEST_UNIFORM = 1 - 2**-53


def uniforms(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_at(logits: list[float], *us: float) -> list[int]:
    """One row of logits, drawn at several uniforms."""
    rows = torch.tensor(logits, dtype=torch.float64).expand(len(us), -1)
    return inverse_cdf(rows, uniforms(*us)).tolist()


def test_edges_of_two_equal_masses_between_zeros_are_exact():
    inf = math.inf
    logits = [-inf, 0.0, -inf, 0.0, -inf]  # probabilities 0, 1/2, 0, 1/2, 0
    us = 0.0, np.nextafter(0.5, 0), 0.5, LARGEST_UNIFORM
    assert draw_at(logits, *us) == [1, 1, 3, 3]


def test_cumulative_masses_are_where_they_should_be():
    logits = [math.log(x) for x in (0.25, 1.0, 0.75)]  # probabilities 1/8, 1/2, 3/8
    assert draw_at(logits, 0.0, 0.1249, 0.1251, 0.6249, 0.6251, LARGEST_UNIFORM) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
def test_equals_a_plain_float64_inverse_cdf(vocabulary: int):
    logits_NV = 3 * normals(500, vocabulary)
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    uniforms_N = member_uniforms(7, 500, 1)[:, 0]
    cdf_NV = np.exp(logits_NV.numpy()).cumsum(-1)
    expected = [
        int(np.searchsorted(cdf_V, u * cdf_V[-1], side="right"))
        for cdf_V, u in zip(cdf_NV, uniforms_N.tolist(), strict=True)
    ]
    assert inverse_cdf(logits_NV, uniforms_N).tolist() == expected


def test_the_largest_uniform_draws_from_the_end_of_the_vocabulary():
    logits_NV = 3 * normals(2000, 1000, seed=4)
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    tokens_N = inverse_cdf(logits_NV, torch.full((2000,), LARGEST_UNIFORM, dtype=torch.float64))
    after_N = [p_V[token + 1 :].sum().item() for p_V, token in zip(logits_NV.softmax(-1), tokens_N, strict=True)]
    assert max(after_N) < 1e-12


def test_a_cumulative_sum_that_rounds_unevenly_does_no_harm(monkeypatch: pytest.MonkeyPatch):
    """A parallel sum, as on a GPU, may step up by a rounding at a token that has no mass."""
    plain = torch.Tensor.cumsum
    step = 2**-50

    def uneven(self: torch.Tensor, dim: int) -> torch.Tensor:
        return plain(self, dim) * (1 + step * (torch.arange(self.shape[-1]) == 2).double())

    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    # Masses 0, 1, 0, 1, 0: the sum is 1 at token 1 and 1 + step at token 2; the target lies between them.
    assert draw_at([-math.inf, 0.0, -math.inf, 0.0, -math.inf], (1 + step / 2) / 2, LARGEST_UNIFORM) == [3, 3]


def test_an_even_grid_of_uniforms_gives_every_token_its_share():
    logits_V = 2 * normals(300, seed=1)
    logits_V -= logits_V.max()
    grid_N = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts_V = torch.bincount(inverse_cdf(logits_V.float().expand(20_000, -1), grid_N), minlength=300)
    # An interval of length p holds 20000 p grid points, up to one; float32 masses may move one more over an edge.
    assert (counts_V - 20_000 * torch.softmax(logits_V, -1)).abs().max() < 2


rows = st.lists(st.floats(-80, 0) | st.just(-math.inf) | st.just(-2000.0), min_size=1, max_size=600)
us = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 5e-324, 0.5, LARGEST_UNIFORM])


@settings(max_examples=150, deadline=None)
@given(rows, st.data(), us, st.sampled_from([torch.float32, torch.float64]))
def test_a_token_without_mass_is_never_drawn(logits: list[float], data: Any, u: float, dtype: torch.dtype):
    logits[data.draw(st.integers(0, len(logits) - 1))] = 0.0
    logits_V = torch.tensor(logits, dtype=dtype)
    token = inverse_cdf(logits_V.unsqueeze(0), uniforms(u)).item()
    assert 0 <= token < len(logits)
    assert logits_V.exp()[int(token)] > 0


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(1, 1.0, 1.0), (5, 1.0, 1.0), (9999, 1.0, 1.0), (0, 0.9, 1.0), (0, 0.01, 1.0), (0, 0.999, 1.0), (40, 0.6, 0.7)],
)
@pytest.mark.parametrize(("vocabulary", "scale"), [(11, 2.0), (3000, 3.0), (3000, 0.1)])
def test_filters_keep_the_sets_that_transformers_keeps(
    top_k: int, top_p: float, temperature: float, vocabulary: int, scale: float
):
    # scale 0.1 is nearly uniform: its nuclei are wider than the candidates that are looked at first.
    logits_NV = scale * normals(8, vocabulary, seed=2)
    ids: Any = None
    expected_NV = TemperatureLogitsWarper(temperature)(ids, logits_NV)
    if top_k:
        expected_NV = TopKLogitsWarper(top_k)(ids, expected_NV)
    if top_p < 1:
        expected_NV = TopPLogitsWarper(top_p)(ids, expected_NV)
    filtered_NV = filter_logits(logits_NV, SamplingParams(1, temperature, top_p, top_k))
    assert torch.equal(filtered_NV.isfinite(), expected_NV.isfinite())
    assert torch.allclose(filtered_NV.softmax(-1), expected_NV.softmax(-1), atol=1e-12)


def kept(probabilities: list[float], **options: Any) -> list[int]:
    filtered_NV = filter_logits(torch.tensor([probabilities], dtype=torch.float64).log(), SamplingParams(1, **options))
    return filtered_NV[0].isfinite().nonzero()[:, 0].tolist()


def test_kept_sets_by_hand():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    assert kept(probabilities, top_p=0.49) == [1]
    assert kept(probabilities, top_p=0.51) == [1, 3]
    assert kept(probabilities, top_p=0.76) == [1, 2, 3]
    assert kept(probabilities, top_p=1e-9) == [1]
    assert kept(probabilities, top_k=2) == [1, 3]
    # Top-k first: 0.5 of the remaining 0.75 is 0.667, past 0.6 alone; without top-k 0.6 needs two tokens.
    assert kept(probabilities, top_p=0.6) == [1, 3]
    assert kept(probabilities, top_p=0.6, top_k=2) == [1]
    # Temperature before top-p: halving it squares the probabilities, 0.25 of 0.345 is 0.72.
    assert kept(probabilities, top_p=0.7, temperature=0.5) == [1]
    assert kept([0.4, 0.2, 0.2, 0.2], top_p=0.5) == [0, 1, 2, 3], "ties with the last one kept are kept"


def test_nothing_is_filtered_by_default():
    logits_NV = normals(4, 50)
    assert filter_logits(logits_NV, SamplingParams(1)).isfinite().all()
    assert torch.equal(logits_NV, normals(4, 50)), "the caller's logits are left alone"


def test_greedy_is_the_argmax_whatever_the_uniform():
    logits_NV = normals(20, 30)
    greedy = SamplingParams(1, temperature=0.0)
    for u in (0.0, LARGEST_UNIFORM):
        assert draw_tokens(logits_NV, torch.full((20,), u, dtype=torch.float64), greedy).equal(logits_NV.argmax(-1))


def test_a_tiny_temperature_does_not_overflow():
    logits_NV = (1e4 * normals(20, 30)).float()
    drawn_N = draw_tokens(logits_NV, member_uniforms(0, 20, 1)[:, 0], SamplingParams(1, temperature=1e-36))
    assert drawn_N.equal(logits_NV.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype):
    logits_NV = normals(200, 700, seed=3).to(dtype)
    uniforms_N = member_uniforms(1, 200, 1)[:, 0]
    expected_N = draw_tokens(logits_NV.float(), uniforms_N, SamplingParams(1))
    assert draw_tokens(logits_NV, uniforms_N, SamplingParams(1)).equal(expected_N)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_a_row_without_a_distribution_is_an_error(row: list[float], temperature: float):
    logits_NV = torch.tensor([[0.0, 1.0], row])
    with pytest.raises(UserError, match="NaN or infinite logits"):
        draw_tokens(logits_NV, uniforms(0.5, 0.5), SamplingParams(1, temperature=temperature))


def test_members_keep_their_uniforms_when_the_group_grows():
    small_GT, large_GT = member_uniforms(5, 3, 37), member_uniforms(5, 64, 37)
    assert torch.equal(small_GT, large_GT[:3])
    assert large_GT.dtype == torch.float64
    assert large_GT.min() >= 0 and large_GT.max() < 1
    assert len(large_GT.unique()) == large_GT.numel()


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**64, 2**64 + 1, 10**30]
    assert len({member_uniforms(seed, 1, 1).item() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
    ],
)
def test_params_out_of_range_are_refused_by_name(wrong: dict[str, Any]):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} is "):
        SamplingParams(**{"max_new_tokens": 4, **wrong})
