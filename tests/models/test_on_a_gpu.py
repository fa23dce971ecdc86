"""What only a GPU shows: its own attention, sums in any order, draws, and whole runs. Skipped where there is none."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, WITHOUT_SDPA, plain_logprobs, ragged_groups, tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo import Completion, Group, GVPOConfig, GVPOTrainer, accumulate_gradients, sequence_logprobs
from gvpo.models import head
from gvpo.models.packed_attention import Way
from gvpo.models.scoring import Scorer
from gvpo.sampling import SamplingParams, TorchSampler
from gvpo.sampling.shared_prefix import gpu_positions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WAYS: list[Way] = ["flex", "members", "mask"]


def small_model(**overrides: Any) -> Any:
    """A random Llama on the GPU whose heads FlexAttention takes: 32 wide, two of them to each of keys and values."""
    settings: dict[str, Any] = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    settings |= {"initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None, **overrides}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).cuda().eval()


def ragged(seed: int = 0, count: int = 5, longest: int = 90) -> list[Group]:
    """Groups of three to five completions of 1 to `longest` tokens, stale ones."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def member() -> Completion:
        ids = torch.randint(97, (number(1, longest),), generator=generator).tolist()
        return Completion(token_ids=ids, reward=number(0, 9) / 9, ref_logprob=-4.0 * len(ids) - number(0, 9))

    return [
        Group(None, [member() for _ in range(number(3, 6))], prompt_ids=[number(0, 97) for _ in range(number(1, 60))])
        for _ in range(count)
    ]


def gradients(model: Any, groups: list[Group], *, way: Way | None = None, bf16: bool = False, **how: Any) -> Tensor:
    """Of all parameters, end to end, in float64 on the CPU."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        accumulate_gradients(Scorer(model, way=way), groups, beta=0.1, **how)
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


def exact_gradients(model: Any, groups: list[Group]) -> Tensor:
    """In float64 on the CPU, every completion in a row of its own."""
    exact = copy.deepcopy(model).cpu().double()
    accumulate_gradients(exact, groups, beta=0.1, share_prefix=False)
    return torch.cat([p.grad.flatten() for p in exact.parameters()])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bf16", "limit"), [(False, 1e-5), (True, 3e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("token_budget", [None, 300])
def test_gradients_are_those_of_rows_apart(way: Way, bf16: bool, limit: float, token_budget: int | None) -> None:
    model, groups = small_model(), ragged()
    ours = gradients(model, groups, way=way, bf16=bf16, token_budget=token_budget)
    assert apart(ours, exact_gradients(model, groups)) < limit


@pytest.mark.parametrize("bf16", [False, True])
def test_rows_shorter_than_a_block_of_flex_attention(bf16: bool) -> None:
    model = small_model()
    for length in (20, 35, 60):
        members = [Completion(token_ids=[5 + n] * length, reward=n, ref_logprob=-9.0 * n) for n in range(2)]
        groups = [Group(None, members, prompt_ids=[1, 2, 3])]
        ours = gradients(model, groups, way="flex", bf16=bf16)
        assert apart(ours, exact_gradients(model, groups)) < (3e-2 if bf16 else 1e-5)


def test_without_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "fused_obstacle", lambda _device: "off")
    model, groups = small_model(), ragged()
    assert apart(gradients(model, groups), exact_gradients(model, groups)) < 1e-5


def test_flex_attention_is_what_a_gpu_takes() -> None:
    assert Scorer(small_model()).way == "flex"
    assert Scorer(small_model(hidden_size=32)).way == "members"
    assert Scorer(small_model().bfloat16()).way == "flex"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture(architecture: str) -> None:
    attention = "eager" if architecture in WITHOUT_SDPA else "sdpa"
    model, groups = tiny(architecture, attention=attention), ragged_groups()
    params, prompts = SamplingParams(9, temperature=0), [group.prompt_ids or [] for group in groups]

    def drawn() -> list[list[int]]:
        samples = TorchSampler(model, []).sample(prompts, 1, params, seeds=range(len(prompts)))
        return [one.token_ids for group in samples for one in group]

    scores_N, tokens = plain_logprobs(model, groups), drawn()
    model.cuda()
    torch.testing.assert_close(sequence_logprobs(model, groups).double().cpu(), scores_N, rtol=1e-5, atol=1e-3)
    assert drawn() == tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_score_is_the_same_bits_again_and_with_a_graph(way: Way, bf16: bool) -> None:
    scorer, groups = Scorer(small_model(), way=way), ragged(longest=400)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            once, again = sequence_logprobs(scorer, groups), sequence_logprobs(scorer, groups)
        assert torch.equal(once, again)
        assert torch.equal(once, sequence_logprobs(scorer, groups).detach())


def test_lengths_do_not_have_kernels_made_anew() -> None:
    from torch._dynamo.utils import counters

    scorer = Scorer(small_model(), way="flex")
    made = []
    for seed in range(6):
        accumulate_gradients(scorer, ragged(seed), beta=0.1)
        made.append(counters["stats"]["unique_graphs"])
    assert made[2:] == made[2:3] * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_draws_are_those_of_the_cpu(dtype: torch.dtype | None) -> None:
    model, params, prompts = small_model(), SamplingParams(20), [[1, 2, 3], [4] * 30, [5]]

    def drawn(model: Any) -> list[list[int]]:
        groups = TorchSampler(model, [7], dtype=dtype).sample(prompts, 6, params, seeds=[1, 2, 3])
        return [one.token_ids for group in groups for one in group]

    there, here = drawn(model), drawn(copy.deepcopy(model).cpu())
    same = sum(one == other for one, other in zip(there, here, strict=True))
    # The uniforms are the same; a token differs where one falls between two roundings.
    assert same >= (17 if dtype is None else 9)


def test_more_is_drawn_at_once_than_on_a_cpu() -> None:
    model = small_model()
    assert TorchSampler(model, [])._room == 262144 and TorchSampler(model.cpu(), [])._room == 32768
    held = torch.cuda.get_device_properties(0).total_memory // 8
    # Keys and values of two layers, two heads of 32.
    assert gpu_positions(model.cuda(), None) == held // (2 * 2 * 2 * 32 * 4)
    assert gpu_positions(model, torch.bfloat16) == held // (2 * 2 * 2 * 32 * 2)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "torch_compile": True}], ids=str)
def test_a_run(settings: dict[str, Any]) -> None:
    rows = [{"prompt_ids": [n, *range(n % 9)]} for n in range(40)]

    def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < 48 for token in ids) / len(ids) for ids in completion_ids]

    config = GVPOConfig(
        num_generations=8,
        max_completion_length=16,
        groups_per_update=4,
        max_steps=8,
        learning_rate=3e-3,
        disable_tqdm=True,
        **settings,
    )
    trainer = GVPOTrainer(small_model().cpu().train(), rows, low, config=config)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == "cuda"
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in trainer.history)
    # The policy that drew a rollout is its reference: the first update's log-ratios are zero to the bit.
    assert [row["log_ratio/mean"] for row in trainer.history[::2]] == [0.0] * 4
    assert trainer.history[-1]["reward"] > trainer.history[0]["reward"]
