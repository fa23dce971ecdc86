"""Attention over packed groups: all ways against the mask that says who sees whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import SHARING, WITHOUT_SDPA, tiny
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.nn.functional import pad, scaled_dot_product_attention

from gvpo.groups import Completion, Group
from gvpo.models import packed_attention
from gvpo.models.batches import Segments, build_inputs, plan_batches
from gvpo.models.encoding import EncodedGroup
from gvpo.models.packed_attention import (
    PackedGroups,
    Spans,
    attend_by_members,
    attending,
    block_mask,
    dense_mask,
    fastest_way,
    is_attending,
    sees,
)
from gvpo.models.scoring import Scorer, sequence_logprobs
from gvpo.training.update import accumulate_gradients

CPU, GPU = torch.device("cpu"), torch.device("cuda")

SHAPES = {
    "ragged": ([4, 1, 7], [[3, 1, 6], [2], [5, 5, 1, 2]]),
    "one token each": ([3, 2], [[1, 1], [1, 2]]),
    "an empty completion": ([2, 3], [[0, 4], [3, 2]]),
    "one prompt length": ([5, 5], [[4, 4], [2, 3]]),
    "prompts made again in the backward pass": ([30, 28], [[3] * 8, [1, 2] * 4]),
}


def segments(shape: str, end_to_end: bool = True) -> Segments:
    prompts, members = SHAPES[shape]
    groups = [
        EncodedGroup([1] * prompt, [[2] * length for length in lengths], [None] * len(lengths))
        for prompt, lengths in zip(prompts, members, strict=True)
    ]
    (batch,) = plan_batches(groups, None, True, end_to_end)
    found = build_inputs(groups, batch, CPU).segments
    assert found is not None
    return found


def test_who_sees_whom() -> None:
    # Prompt of two, completions of two and one, and padding, which sees something too: a row of nothing gives NaN.
    seen = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
    one = Segments(torch.tensor([[0] * 6]), torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert dense_mask(one).shape == (1, 1, 6, 6)
    assert dense_mask(one)[0, 0].int().tolist() == [*seen, [1, 1, 0, 0, 0, 1]]
    # Another group behind it sees nothing of it.
    two = Segments(torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2]]))
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    assert dense_mask(two)[0, 0].int().equal(torch.block_diag(seen, seen).int())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_function_of_flex_attention_says_what_the_mask_says(shape: str) -> None:
    for end_to_end in (True, False):
        found = segments(shape, end_to_end)
        rows, width = found.group_BL.shape
        for function in (sees(found), Spans.of(found).sees()):
            assert torch.equal(create_mask(function, rows, 1, width, width, device="cpu"), dense_mask(found))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_those_of_the_mask(shape: str, size: int) -> None:
    for end_to_end in (True, False):
        found = segments(shape, end_to_end)
        short = -found.group_BL.shape[1] % size
        tiles = pad(dense_mask(found), (0, short, 0, short)).unflatten(3, (-1, size)).unflatten(2, (-1, size))
        some, whole = Spans.of(found).blocks(size)
        assert torch.equal(some, tiles.any(5).any(3)) and torch.equal(whole, tiles.all(5).all(3))


def test_the_block_mask_is_torchs_own() -> None:
    groups = [EncodedGroup([1] * prompt, [[2] * n for n in (300, 1, 129, 520)], [None] * 4) for prompt in (700, 130)]
    (batch,) = plan_batches(groups, None, True, end_to_end=True)
    found = build_inputs(groups, batch, CPU).segments
    assert found is not None
    width = found.group_BL.shape[1]
    ours, theirs = block_mask(found), create_block_mask(sees(found), 1, None, width, width, device="cpu")
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)) and getattr(ours, name).sum() > 0
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_lengths_that_differ_much_are_not_padded_to_one_another() -> None:
    # One long prompt and one long completion among many short ones.
    prompts, members = [64] + [2] * 20, [[2, 40, 2, 2]] + [[2, 2]] * 20
    encoded = [
        EncodedGroup([1] * prompt, [[2] * (length + 1) for length in lengths], [None] * len(lengths))
        for prompt, lengths in zip(prompts, members, strict=True)
    ]
    (batch,) = plan_batches(encoded, None, True, end_to_end=True)
    found = build_inputs(encoded, batch, CPU).segments
    assert found is not None
    packed = PackedGroups.of(found)
    tokens = batch.positions - sum(len(lengths) for lengths in members)
    assert tokens == found.group_BL.numel()
    assert sum(block.queries_NT.numel() for block in packed.blocks) == tokens
    assert packed.keys == sum(prompts) + sum(
        p + n for p, lengths in zip(prompts, members, strict=True) for n in lengths
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("end_to_end", [True, False])
def test_outputs_and_gradients_are_those_under_the_mask(
    shape: str, heads: tuple[int, int], end_to_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, recomputed = segments(shape, end_to_end), []
    kept = packed_attention.checkpoint
    monkeypatch.setattr(packed_attention, "checkpoint", lambda *a, **k: recomputed.append(1) or kept(*a, **k))
    rows, width = found.group_BL.shape
    torch.manual_seed(0)
    states = [torch.randn(rows, h, width, 8, dtype=torch.float64).requires_grad_() for h in (heads[0], *[heads[1]] * 2)]
    outs = [
        attend_by_members(*states, PackedGroups.of(found), 0.4),  # pyright: ignore[reportCallIssue]
        scaled_dot_product_attention(*states, attn_mask=dense_mask(found), scale=0.4, enable_gqa=True).transpose(1, 2),  # pyright: ignore
    ]
    assert bool(recomputed) == shape.startswith("prompts made again")
    # Padding is nobody's output.
    real = found.member_BL >= 0
    direction = torch.randn_like(outs[0][real])
    results = [(out[real], *torch.autograd.grad((out[real] * direction).sum(), states)) for out in outs]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def ragged_groups() -> list[Group]:
    """Stale: the reference is several nats away."""
    groups = []
    for prompt, lengths in ((4, [2, 7]), (9, [1, 3, 3])):
        members = [
            Completion(token_ids=[3] * n + [k], reward=float(k * n % 3), ref_logprob=-5.0 * k)
            for k, n in enumerate(lengths)
        ]
        groups.append(Group(None, members, prompt_ids=[5] * prompt))
    return groups


@pytest.fixture
def by_members(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for every call of `attend_by_members`."""
    calls: list[int] = []
    attend = packed_attention.attend_by_members
    monkeypatch.setattr(packed_attention, "attend_by_members", lambda *given: calls.append(1) or attend(*given))
    yield calls


@pytest.mark.parametrize("architecture", [name for name in SHARING if name not in WITHOUT_SDPA])
@torch.no_grad()
def test_scores_are_the_same_in_every_way(architecture: str, by_members: list[int]) -> None:
    model = tiny(architecture, attention="sdpa")
    fastest, masked = Scorer(model), Scorer(model, way="mask")
    expected = sequence_logprobs(masked, ragged_groups(), share_prefix=False)
    by_members.clear()
    torch.testing.assert_close(sequence_logprobs(masked, ragged_groups()), expected, rtol=1e-5, atol=1e-4)
    assert not by_members
    torch.testing.assert_close(sequence_logprobs(fastest, ragged_groups()), expected, rtol=1e-5, atol=1e-4)
    assert bool(by_members) == (fastest.way == "members")
    assert model.config._attn_implementation == "sdpa"


def test_flex_attention_scores_the_same() -> None:
    # On a CPU it has a forward pass, and none backward. Not compiled: that takes a minute, and computes the same.
    model = tiny("llama", attention="sdpa")
    expected = sequence_logprobs(model, ragged_groups(), share_prefix=False)
    flex = Scorer(model, way="flex")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert flex.shares_prefix
        torch.testing.assert_close(sequence_logprobs(flex, ragged_groups()), expected.detach(), rtol=1e-5, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("autocast", [False, True])
def test_flex_attention_is_given_one_precision_and_never_decodes(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def forward(_module: Any, *states: Any, **others: Any) -> tuple[Tensor, None]:
        given.append((*states[:3], others["kernel_options"]))
        return states[0].transpose(1, 2), None

    monkeypatch.setattr("transformers.integrations.flex_attention.flex_attention_forward", forward)
    # As rotations leave them: queries and keys in float32, values in what their layer computed.
    value = torch.randn(1, 2, 5, 16).to(torch.bfloat16 if autocast else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed_attention._attend_by_flex(torch.nn.Module(), value.float(), value.float(), value, None)
    ((*states, options),) = given
    assert {one.dtype for one in states} == {value.dtype}
    assert options == {"FORCE_USE_FLEX_ATTENTION": True}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_layers_that_are_computed_twice_are_so_in_one_way(by_members: list[int]) -> None:
    def gradients(model: Any) -> list[Tensor]:
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return grads

    model = tiny("llama", attention="sdpa").double().train()
    layers = model.config.num_hidden_layers
    accumulate_gradients(model, ragged_groups(), beta=0.1)
    updates = gradients(model)
    sequence_logprobs(model, ragged_groups()).sum().backward()
    scores = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    by_members.clear()
    accumulate_gradients(model, ragged_groups(), beta=0.1)
    torch.testing.assert_close(gradients(model), updates, rtol=1e-9, atol=1e-10)
    assert len(by_members) == 2 * layers
    by_members.clear()
    # What comes backward later than this call cannot know in which way it was.
    sequence_logprobs(model, ragged_groups()).sum().backward()
    torch.testing.assert_close(gradients(model), scores, rtol=1e-9, atol=1e-10)
    assert not by_members


@pytest.mark.parametrize("extra", [{"s_aux": 1}, {"sliding_window": 3}, {"dropout": 1e-9}], ids=str)
def test_what_is_not_computed_here_goes_to_sdpa(extra: dict[str, Any], by_members: list[int]) -> None:
    found = segments("ragged")
    states = torch.randn(1, 2, found.group_BL.shape[1], 4)
    given = (torch.nn.Module(), states, states, states, None)
    packed = PackedGroups.of(found)
    out, _ = packed_attention._attend(*given, packed_groups=packed, **extra)
    masked = scaled_dot_product_attention(states, states, states, attn_mask=dense_mask(found))
    torch.testing.assert_close(out, masked.transpose(1, 2))
    assert not by_members
    packed_attention._attend(*given, packed_groups=packed)
    assert by_members


class TestTheFastestWay:
    def test_by_device_and_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert fastest_way(tiny("llama"), "sdpa", CPU) == "members"
        assert fastest_way(tiny("llama"), "eager", CPU) == "mask"
        monkeypatch.setattr(packed_attention, "flex_obstacle", lambda _device: None)
        wide = {"head_dim": 16}
        assert fastest_way(tiny("llama", **wide), "sdpa", GPU) == "flex"
        assert fastest_way(tiny("llama", **wide).double(), "sdpa", GPU) == "members"
        assert fastest_way(tiny("llama", **wide, attention_dropout=0.1), "sdpa", GPU) == "members"
        # FlexAttention's kernels know no smaller heads.
        assert fastest_way(tiny("llama"), "sdpa", GPU) == "members"
        unsaid = tiny("llama", hidden_size=64, head_dim=16)
        unsaid.config.head_dim = None
        assert fastest_way(unsaid, "sdpa", GPU) == "flex"

    def test_layers_with_a_config_of_their_own_mask(self) -> None:
        model = tiny("llama")
        model.model.layers[1].self_attn.config = type(model.config)()
        assert fastest_way(model, "sdpa", CPU) == "mask"

    def test_a_model_that_does_not_hand_on_what_it_is_given_masks(self) -> None:
        model = tiny("llama", attention="sdpa")
        forward = model.model.forward

        def dropping(input_ids: Any = None, position_ids: Any = None, packed_groups: Any = None, **others: Any) -> Any:
            return forward(input_ids=input_ids, position_ids=position_ids, **others)

        model.model.forward = dropping
        assert fastest_way(model, "sdpa", CPU) == "members"
        assert Scorer(model).way == "mask"
        assert Scorer(model).shares_prefix

    def test_what_keeps_flex_attention_away_has_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert packed_attention.flex_obstacle(CPU) == "flex_attention has no backward pass on a CPU"
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        assert packed_attention.flex_obstacle(GPU) == "triton is not installed"


def test_a_model_attends_as_before_after_an_error() -> None:
    model = tiny("llama", attention="sdpa")
    with pytest.raises(KeyError), attending(model, "members", "sdpa"):
        assert is_attending(model, "members", "sdpa")
        with attending(model, "mask", "sdpa"):
            assert model.config._attn_implementation == "sdpa"
        assert is_attending(model, "members", "sdpa")
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
