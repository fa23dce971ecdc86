"""The log-prob head: which transform is chosen, what passes through it, and what the backward pass keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, plain_logprobs, ragged_groups, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from gvpo.models import head
from gvpo.models.head import find_head, gather_logprobs, token_logprobs
from gvpo.models.scoring import Scorer, sequence_logprobs


def llama_whose_logits_are(transform: Callable[[Tensor], Tensor]) -> Any:
    """A Llama with a step of its own between head and logits, which nothing in its config tells."""

    class Transformed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = transform(output.logits)
            return output

    model = Transformed(tiny().config).eval()
    model.load_state_dict(tiny().state_dict())
    return model


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a power": lambda logits: logits**3,
    "a bias": lambda logits: logits + torch.arange(VOCABULARY) / 1000,
    "a factor": lambda logits: 1.01 * logits,
    # A tiny model's logits are far below it: at their own size nothing would show.
    "a cap far away": lambda logits: 1000 * torch.tanh(logits / 1000),
    "a clamp far away": lambda logits: logits.clamp(max=500),
    "tokens ruled out": lambda logits: logits.masked_fill(torch.arange(VOCABULARY) > 29, -100.0),
    "a position": lambda logits: logits * (1 + torch.arange(logits.shape[1])[:, None] / 10),
}


class TestChoice:
    @pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama4"])
    def test_the_head_gives_the_models_own_logits(self, architecture: str) -> None:
        model = tiny(architecture)
        logits = find_head(model)
        assert logits is not None
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        with torch.no_grad():
            own = model(ids).logits
            ours = logits(model.base_model(ids).last_hidden_state)
        assert float((ours - own).abs().max()) < 1e-5 * float(own.abs().max())

    @pytest.mark.parametrize("kind", UNKNOWN)
    def test_what_is_unknown_falls_back_to_the_models_logits(self, kind: str) -> None:
        model, groups = llama_whose_logits_are(UNKNOWN[kind]), ragged_groups()
        assert find_head(model) is None
        with torch.no_grad():
            plain_N = plain_logprobs(model, groups)
            for share_prefix in (True, False):
                ours_N = sequence_logprobs(model, groups, share_prefix=share_prefix)
                assert torch.allclose(ours_N.double(), plain_N, rtol=1e-5, atol=1e-4)

    def test_a_change_between_base_model_and_head_is_seen(self) -> None:
        assert find_head(llama_whose_logits_are(lambda logits: logits)) is not None

        class Halved(LlamaForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                hidden = self.model(*args, **kwargs).last_hidden_state
                return SimpleNamespace(logits=self.lm_head(hidden / 2))

        assert find_head(Halved(tiny().config).eval()) is None

    @pytest.mark.parametrize("architecture", ["cohere", "granite", "gemma2"])
    def test_a_config_that_the_model_does_not_follow(self, architecture: str) -> None:
        # A Llama with another family's factor or cap in its config.
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        own = {name: value for name, value in ARCHITECTURES[architecture][1].items() if name in names}
        assert own
        model, groups = tiny("llama", **own), ragged_groups()
        assert Scorer(model).head is not None
        with torch.no_grad():
            assert float((sequence_logprobs(model, groups) - plain_logprobs(model, groups)).abs().max()) < 1e-4

    def test_the_biases_of_a_head(self) -> None:
        model = tiny("gpt2")
        model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
        groups = ragged_groups()
        assert Scorer(model).head is not None
        with torch.no_grad():
            assert float((sequence_logprobs(model, groups) - plain_logprobs(model, groups)).abs().max()) < 1e-4

    @pytest.mark.parametrize("architecture", ["llama", "cohere", "granite", "gemma2"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models_keep_their_head(self, architecture: str, dtype: torch.dtype) -> None:
        assert find_head(tiny(architecture).to(dtype)) is not None

    def test_it_is_chosen_once_and_follows_a_replaced_head(self) -> None:
        model = tiny()
        find_head(model)
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
        logits = find_head(model)
        assert not calls
        assert logits is not None
        hidden = torch.randn(2, 32)
        assert torch.equal(logits(hidden), model.lm_head(hidden))


class TestWhatPasses:
    def test_only_scored_positions_pass_through_the_head(self) -> None:
        model, groups, rows = tiny(), ragged_groups(), []
        scorer = Scorer(model)
        model.lm_head.register_forward_hook(lambda _module, args, _output: rows.append(args[0].numel() // 32))
        scored = sum(
            len(member.token_ids or []) if member.loss_mask is None else sum(member.loss_mask)
            for group in groups
            for member in group.completions
        )
        for share_prefix in (True, False):
            for budget in (None, 26):
                rows.clear()
                with torch.no_grad():
                    sequence_logprobs(scorer, groups, token_budget=budget, share_prefix=share_prefix)
                assert sum(rows) == scored

    def test_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, groups, rows = tiny(), ragged_groups(), []
        whole_N = sequence_logprobs(model, groups)
        model.lm_head.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
        for elements, most in ((5 * VOCABULARY, 5), (1, 1)):
            monkeypatch.setattr(head, "CHUNK_ELEMENTS", elements)
            rows.clear()
            chunked_N = sequence_logprobs(model, groups)
            assert max(rows) == most
            assert float((chunked_N - whole_N).detach().abs().max()) < 1e-4

    def test_log_probs_of_logits(self) -> None:
        logits_MV = torch.tensor([[0.0, 1.0, 2.0], [1000.0, 0.0, 0.0], [-30.0, 60.0, 0.0]])
        ours_M = gather_logprobs(logits_MV, torch.tensor([2, 0, 0]))
        assert ours_M.tolist() == pytest.approx(
            [2 - torch.tensor([0.0, 1.0, 2.0]).exp().sum().log().item(), 0.0, -90.0]
        )
        assert gather_logprobs(logits_MV.bfloat16(), torch.tensor([2, 0, 0])).dtype == torch.float32
        assert gather_logprobs(logits_MV.double(), torch.tensor([2, 0, 0])).dtype == torch.float64


class Alive(TorchDispatchMode):
    """The largest tensor that is made inside the block, and the most bytes of such tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self.seen:
            return
        self.seen.add(pointer)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer: int, size: int) -> None:
        self.seen.discard(pointer)
        self.now -= size


class TestMemory:
    """512 tokens, 32768 words, hidden size 8: logits are 64 MiB, hidden states 16 KiB."""

    TOKENS, WORDS, HIDDEN = 512, 32768, 8

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden_MD = torch.randn(self.TOKENS, self.HIDDEN, generator=generator, requires_grad=True)
        weight_VD = torch.randn(self.WORDS, self.HIDDEN, generator=generator, requires_grad=True)
        return hidden_MD, weight_VD, torch.randint(0, self.WORDS, (self.TOKENS,), generator=generator)

    def saved(self, run: Callable[[], Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            run()
        return kept

    @pytest.mark.parametrize("rows", [8, 64])
    def test_a_few_chunks_are_saved_for_the_backward_pass(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * self.WORDS)
        hidden_MD, weight_VD, targets_M = self.inputs()
        kept = self.saved(lambda: token_logprobs(hidden_MD, targets_M, lambda h: h @ weight_VD.T, self.WORDS))
        total = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values())
        chunks = head.KEPT_CHUNKS * rows * self.WORDS * 4
        small = 2 * (hidden_MD.nbytes + targets_M.nbytes) + head.KEPT_CHUNKS * weight_VD.nbytes
        assert chunks < total < chunks + small
        assert chunks < self.TOKENS * self.WORDS * 4
        # The negative control.
        kept = self.saved(lambda: gather_logprobs(hidden_MD @ weight_VD.T, targets_M))
        assert max(tensor.numel() for tensor in kept) == self.TOKENS * self.WORDS

    @pytest.mark.parametrize("rows", [8, 24])
    def test_no_more_than_a_few_chunks_are_alive_at_once(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * self.WORDS)
        hidden_MD, weight_VD, targets_M = self.inputs()
        chunk, everything = rows * self.WORDS * 4, self.TOKENS * self.WORDS * 4
        small = 2 * (hidden_MD.nbytes + targets_M.nbytes) + 2 * weight_VD.nbytes
        with Alive() as forward:
            logps_M = token_logprobs(hidden_MD, targets_M, lambda h: h @ weight_VD.T, self.WORDS)
        assert forward.largest == rows * self.WORDS
        waiting = head.KEPT_CHUNKS * chunk
        assert forward.peak < waiting + 3 * chunk + small
        assert forward.now < waiting + small
        with Alive() as backward:
            logps_M.sum().backward()
        assert backward.largest == rows * self.WORDS
        # What waits is counted from its making on, which was before.
        assert backward.peak < 5 * chunk + small < everything
        with Alive() as plain:
            gather_logprobs(hidden_MD @ weight_VD.T, targets_M).sum().backward()
        assert plain.peak > 2 * everything

    def test_the_gradient_is_that_of_plain_autograd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden_MD, weight_VD, targets_M = self.inputs()
        gradients = []
        for elements in (2**30, 100 * self.WORDS):
            monkeypatch.setattr(head, "CHUNK_ELEMENTS", elements)
            logps_M = token_logprobs(hidden_MD, targets_M, lambda h: h @ weight_VD.T, self.WORDS)
            gradients.append(torch.autograd.grad(logps_M.square().sum(), (hidden_MD, weight_VD)))
        logps_M = (hidden_MD @ weight_VD.T).double().log_softmax(-1).gather(1, targets_M[:, None])[:, 0]
        plain = torch.autograd.grad(logps_M.square().sum(), (hidden_MD, weight_VD))
        for ours in gradients:
            for one, other in zip(ours, plain, strict=True):
                assert float((one - other).norm() / other.norm()) < 1e-5
