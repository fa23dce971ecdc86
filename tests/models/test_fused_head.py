"""The fused log-prob head: what goes through it, and Liger Kernel's own gradients.

On a CPU the kernel runs in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/models/test_fused_head.py,
with liger-kernel and triton installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, plain_logprobs, ragged_groups, tiny
from torch import Tensor, nn

from gvpo.groups import Completion, Group
from gvpo.models import head
from gvpo.models.head import PlainHead, fused_obstacle, token_logprobs
from gvpo.models.scoring import sequence_logprobs
from gvpo.training.update import accumulate_gradients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Call = dict[str, Any]


@pytest.fixture(name="calls")
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What Liger Kernel is asked for; the same from torch is its answer."""
    calls: list[Call] = []

    def answer(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        calls.append({"hidden": hidden, "weight": weight, "bias": bias, **options})
        logits = nn.functional.linear(hidden, weight, bias)
        return nn.functional.cross_entropy(logits.float(), target, reduction="none")

    module: Any = ModuleType("functional")
    module.liger_fused_linear_cross_entropy = answer
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    monkeypatch.setattr(head, "fused_obstacle", lambda _device: None)
    return calls


def with_bias() -> Any:
    model = tiny("gpt2")
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
    return model


PLAIN: dict[str, Callable[[], Any]] = {
    "llama": tiny,
    "tied": lambda: tiny("llama", tie_word_embeddings=True),
    "a factor in the config alone": lambda: tiny("llama", logit_scale=0.25),
    "a bias": with_bias,
    "an adapter elsewhere": lambda: get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).eval(),
}


def hooked() -> Any:
    model = tiny()
    model.lm_head.register_forward_hook(lambda _module, _args, output: 2 * output)
    return model


def replaced() -> Any:
    model = tiny()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    return model


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def subclassed() -> Any:
    model = tiny()
    model.lm_head.__class__ = Doubled
    return model


def adapted() -> Any:
    settings = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    return get_peft_model(tiny(), settings).eval()


OTHER: dict[str, Callable[[], Any]] = {
    "a factor": lambda: tiny("cohere"),
    "a divisor": lambda: tiny("granite"),
    "a cap": lambda: tiny("gemma2"),
    "float64": lambda: tiny().double(),
    "an adapter on the head": adapted,
    "a hook": hooked,
    "another forward": replaced,
    "another layer": subclassed,
}


class TestWhatGoesThroughIt:
    @pytest.mark.parametrize("kind", PLAIN)
    def test_plain_linear_heads(self, kind: str, calls: list[Call]) -> None:
        model, groups = PLAIN[kind](), ragged_groups()
        with torch.no_grad():
            ours_N = sequence_logprobs(model, groups)
        assert calls and all(call["reduction"] == "none" for call in calls)
        linear = model.get_output_embeddings()
        assert all(call["weight"] is linear.weight and call["bias"] is linear.bias for call in calls)
        with torch.no_grad():
            assert float((ours_N - plain_logprobs(model, groups)).abs().max()) < 1e-4

    @pytest.mark.parametrize("kind", OTHER)
    def test_nothing_else(self, kind: str, calls: list[Call]) -> None:
        model, groups = OTHER[kind](), ragged_groups()
        with torch.no_grad():
            ours_N = sequence_logprobs(model, groups)
            assert float((ours_N - plain_logprobs(model, groups)).abs().max()) < 1e-4
        assert not calls

    def test_no_tokens(self, calls: list[Call]) -> None:
        group = Group(None, [Completion(token_ids=[1], loss_mask=[False])], prompt_ids=[2])
        assert sequence_logprobs(tiny(), [group]).tolist() == [0.0]
        assert not calls

    def test_it_computes_in_autocasts_precision_and_adds_up_in_float32(self, calls: list[Call]) -> None:
        linear, targets_M = nn.Linear(8, 16), torch.arange(5)
        hidden_MD = torch.randn(5, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            logps_M = token_logprobs(hidden_MD, targets_M, PlainHead(linear), 16)
        (call,) = calls
        assert {call[name].dtype for name in ("hidden", "weight", "bias")} == {torch.bfloat16}
        assert call["accum_dtype"] == logps_M.dtype == torch.float32
        logps_M.sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            token_logprobs(hidden_MD, targets_M, PlainHead(linear), 16)
        assert calls[1]["hidden"] is hidden_MD and calls[1]["weight"] is linear.weight


class TestObstacles:
    GPU = torch.device("cuda")

    @pytest.fixture(autouse=True)
    def _anew(self) -> Iterator[None]:
        fused_obstacle.cache_clear()
        yield
        fused_obstacle.cache_clear()

    def test_a_cpu(self) -> None:
        assert fused_obstacle(torch.device("cpu")) == "no CUDA GPU"

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr("importlib.metadata.version", missing)
        assert fused_obstacle(self.GPU) == "liger-kernel is not installed"

    @pytest.mark.parametrize(
        ("version", "wrong"), [("0.6.4", True), ("0.8.1", True), ("0.8.2", False), ("0.10.0.dev1", False), ("1", False)]
    )
    def test_versions(self, version: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
        monkeypatch.setattr(head, "triton_obstacle", lambda: None)
        reason = f"liger-kernel {version} gives wrong gradients token by token; 0.8.2 does not"
        assert fused_obstacle(self.GPU) == (reason if wrong else None)

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.8.2")
        monkeypatch.setattr(head, "triton_obstacle", lambda: "triton is not installed")
        assert fused_obstacle(self.GPU) == "triton is not installed"


def relative(ours: Tensor, plain: Tensor) -> float:
    return float(((ours - plain).norm() / plain.norm()).detach())


class TestTheKernel:
    """Liger Kernel itself, compiled on a GPU: 23 tokens, hidden size 8, 37 words, so that it makes three chunks."""

    @pytest.fixture(autouse=True)
    def _on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("liger_kernel")
        if DEVICE.type == "cpu":
            # Read when triton is imported, which other tests may do: too late to be set here.
            if os.environ.get("TRITON_INTERPRET") != "1":
                pytest.skip("on a CPU it runs with TRITON_INTERPRET=1 in the environment")
            monkeypatch.setattr(head, "fused_obstacle", lambda _device: None)
        elif reason := fused_obstacle(DEVICE):
            pytest.skip(reason)
        # Were it not fused, the chunked head would be tested.
        monkeypatch.setattr(head, "_chunk_logprobs", None)

    def inputs(self, bias: bool) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
        """Hidden states, a layer, targets, and upstream gradients of both signs and very unequal sizes."""
        torch.manual_seed(0)
        linear = nn.Linear(8, 37, bias=bias).to(DEVICE)
        hidden_MD = torch.randn(23, 8, device=DEVICE, requires_grad=True)
        targets_M = torch.randint(0, 37, (23,), device=DEVICE)
        return hidden_MD, linear, targets_M, torch.randn(23, device=DEVICE) * torch.logspace(-2, 2, 23, device=DEVICE)

    def plain(self, hidden_MD: Tensor, linear: nn.Linear, targets_M: Tensor) -> Tensor:
        bias_V = None if linear.bias is None else linear.bias.double()
        logits_MV = nn.functional.linear(hidden_MD.double(), linear.weight.double(), bias_V)
        return logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
    def test_every_tokens_upstream_gradient_counts_for_itself(self, bias: bool, frozen: str) -> None:
        hidden_MD, linear, targets_M, upstream_M = self.inputs(bias)
        linear.requires_grad_(frozen != "head")
        hidden_MD.requires_grad_(frozen != "hidden")
        trained = [tensor for tensor in (hidden_MD, *linear.parameters()) if tensor.requires_grad]
        logps_M = token_logprobs(hidden_MD, targets_M, PlainHead(linear), 37)
        plain_M = self.plain(hidden_MD, linear, targets_M)
        assert logps_M.dtype == torch.float32 and relative(logps_M, plain_M) < 1e-6
        ours = torch.autograd.grad(logps_M, trained, upstream_M)
        for one, other in zip(ours, torch.autograd.grad(plain_M, trained, upstream_M.double()), strict=True):
            assert relative(one, other) < 1e-6

    def test_scores_are_the_same_bits_with_and_without_a_graph(self) -> None:
        hidden_MD, linear, targets_M, _ = self.inputs(False)
        with torch.no_grad():
            scored_M = token_logprobs(hidden_MD, targets_M, PlainHead(linear), 37)
        assert torch.equal(scored_M, token_logprobs(hidden_MD, targets_M, PlainHead(linear), 37))

    def test_not_a_number_stays_not_a_number(self) -> None:
        hidden_MD, linear, targets_M, _ = self.inputs(False)
        with torch.no_grad():
            hidden_MD[3, 2] = float("nan")
            lost_M = token_logprobs(hidden_MD, targets_M, PlainHead(linear), 37).isnan()
        assert lost_M.nonzero().tolist() == [[3]]

    def test_under_autocast(self) -> None:
        hidden_MD, linear, targets_M, upstream_M = self.inputs(False)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logps_M = token_logprobs(hidden_MD, targets_M, PlainHead(linear), 37)
        plain_M = self.plain(hidden_MD, linear, targets_M)
        assert logps_M.dtype == torch.float32 and float((logps_M - plain_M).detach().abs().max()) < 0.05
        ours = torch.autograd.grad(logps_M, (hidden_MD, linear.weight), upstream_M)
        plain = torch.autograd.grad(plain_M, (hidden_MD, linear.weight), upstream_M.double())
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == torch.float32 and relative(one, other) < 0.02

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("token_budget", [None, 26])
    def test_a_models_gradient_is_that_of_the_chunked_head(
        self, tied: bool, token_budget: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, groups = tiny("llama", tie_word_embeddings=tied).to(DEVICE), ragged_groups()
        generator = torch.Generator().manual_seed(1)
        for group in groups:
            for member in group.completions:
                reward, log_ratio = torch.randn(2, generator=generator).tolist()
                member.reward, member.ref_logprob = reward, -20 + 10 * log_ratio

        def gradients() -> list[Tensor]:
            model.zero_grad()
            accumulate_gradients(model, groups, beta=0.1, token_budget=token_budget)
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        ours = gradients()
        monkeypatch.undo()
        monkeypatch.setattr(head, "fused_obstacle", lambda _device: "off")
        chunked = gradients()
        assert len(ours) == len(list(model.parameters()))
        for one, other in zip(ours, chunked, strict=True):
            assert relative(one, other) < 1e-4
