"""Attention of packed groups against attention under the mask that says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gvpo.groups import Completion, Group
from gvpo.models import group_attention
from gvpo.models.batches import build_inputs, plan_batches
from gvpo.models.encoding import EncodedGroup
from gvpo.models.group_attention import packed_attention
from gvpo.models.scoring import Scorer, sequence_logprobs
from models.tiny_models import tiny

SHAPES = {
    "ragged": ([4, 1, 7], [[3, 1, 6], [2], [5, 5, 1, 2]]),
    "one token each": ([3, 2], [[1, 1], [1, 2]]),
    "an empty completion": ([2, 3], [[0, 4], [3, 2]]),
}


def inputs(prompts: list[int], members: list[list[int]]) -> Any:
    groups = [
        EncodedGroup([1] * prompt, [[2] * length for length in lengths], [None] * len(lengths))
        for prompt, lengths in zip(prompts, members, strict=True)
    ]
    (batch,) = plan_batches(groups, None, share_prefix=True)
    return build_inputs(groups, batch, torch.device("cpu"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_outputs_and_gradients_are_those_under_the_mask(shape: str, heads: tuple[int, int]) -> None:
    given = inputs(*SHAPES[shape])
    rows, width = given.input_ids_BL.shape
    torch.manual_seed(0)
    states = [torch.randn(rows, h, width, 8, dtype=torch.float64).requires_grad_() for h in (heads[0], *[heads[1]] * 2)]
    masked = scaled_dot_product_attention(*states, attn_mask=given.mask_BL, scale=0.4, enable_gqa=True)  # pyright: ignore
    packed = packed_attention(*states, given.layout, 0.4)
    # Padding is nobody's output.
    real = given.mask_BL.diagonal(dim1=-2, dim2=-1)[:, 0] & (given.layout.sources_BL > 0)
    real[0, 0] = True

    def seen(out_BLHD: Tensor) -> Tensor:
        return out_BLHD[real]

    torch.testing.assert_close(seen(packed), seen(masked.transpose(1, 2)), rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(seen(packed))
    ours = torch.autograd.grad((seen(packed) * direction).sum(), states)
    theirs = torch.autograd.grad((seen(masked.transpose(1, 2)) * direction).sum(), states)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def ragged_groups() -> list[Group]:
    return [
        Group(None, [Completion(token_ids=[3] * n + [k]) for k, n in enumerate(lengths)], prompt_ids=[5] * prompt)
        for prompt, lengths in ((4, [2, 7]), (9, [1, 3, 3]))
    ]


def test_a_model_scores_by_groups_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(attention="sdpa").double()
    calls: list[int] = []
    attention = group_attention.packed_attention
    monkeypatch.setattr(group_attention, "packed_attention", lambda *given: calls.append(1) or attention(*given))
    apart = sequence_logprobs(model, ragged_groups(), share_prefix=False)
    calls.clear()
    together = sequence_logprobs(model, ragged_groups())
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_layers_attend_under_the_mask() -> None:
    model = tiny(attention="sdpa").double().train()
    sequence_logprobs(model, ragged_groups()).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]  # pyright: ignore[reportOptionalMemberAccess]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sequence_logprobs(model, ragged_groups()).sum().backward()
    for parameter, before in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("extra", [{"s_aux": 1}, {"sliding_window": 3}, {"dropout": 1e-9}], ids=str)
def test_what_is_not_computed_here_goes_to_sdpa(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("attention by groups does not know this")

    monkeypatch.setattr(group_attention, "packed_attention", refuse)
    given = inputs(*SHAPES["ragged"])
    states = torch.randn(3, 2, given.input_ids_BL.shape[1], 4)
    arguments = (torch.nn.Module(), states, states, states, given.mask_BL)
    out, _ = group_attention._attend(*arguments, group_layout=given.layout, **extra)
    masked = scaled_dot_product_attention(states, states, states, attn_mask=given.mask_BL)
    torch.testing.assert_close(out, masked.transpose(1, 2))
    with pytest.raises(AssertionError):
        group_attention._attend(*arguments, group_layout=given.layout)


def test_the_scorer_of_an_eager_model_masks() -> None:
    assert not Scorer(tiny(attention="eager")).attends_by_groups
