"""Packed linear layers against the layers that they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo.sampling import packed_linear
from gvpo.sampling.packed_linear import PackedLinear, pack_linears
from gvpo.sampling.shared_prefix import reading_copy

pytestmark = pytest.mark.skipif(not packed_linear._can_pack(), reason="this build of torch has no packed products")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_outputs_and_weights_are_the_layers(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(48, 80, bias=bias).to(dtype)
    packed = PackedLinear(layer)
    for shape in ((1, 48), (7, 48), (3, 5, 48), (300, 48)):
        inputs = torch.randn(shape, dtype=dtype)
        exact = inputs.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
        limit = 4e-6 if dtype == torch.float32 else 0.03  # of sums of 48 products of about 0.1
        assert float((packed(inputs).double() - exact).abs().max()) < limit
    assert torch.equal(packed.weight, layer.weight)


def test_what_is_no_plain_layer_stays() -> None:
    class Other(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "other": Other(4, 4), "exact": nn.Linear(4, 4).double()})
    model["inner"] = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    before = copy.deepcopy(model)
    pack_linears(model)
    assert [type(layer) for layer in (model["plain"], model["inner"][0])] == [PackedLinear] * 2  # pyright: ignore
    assert [type(layer) for layer in (model["other"], model["exact"])] == [Other, nn.Linear]
    assert type(model["inner"][1]) is nn.Embedding  # pyright: ignore[reportIndexIssue]
    assert type(before["plain"]) is nn.Linear


def test_without_the_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_can_pack", lambda: False)
    model = nn.Sequential(nn.Linear(4, 4))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


@torch.no_grad()
def test_a_copy_for_reading_is_packed_where_it_is_cast() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    for dtype, kind in ((None, nn.Linear), (torch.float32, PackedLinear)):
        reader = reading_copy(model, dtype)
        assert {name.split(".")[-1] for name, layer in reader.named_modules() if type(layer) is kind} == layers
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
