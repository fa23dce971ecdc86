"""The decode loop against enumerated distributions, Hugging Face generate, and itself in other batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from gvpo.errors import UserError
from gvpo.sampling import Sample, SamplingParams, TorchSampler, torch_sampler
from gvpo.sampling.plain_reader import PlainReader
from gvpo.sampling.shared_prefix import (
    SharedPrefixReader,
    Unsupported,
    _attend,
    can_share,
    fill_holes,
    make_reader,
    reading_copy,
)
from gvpo.sampling.torch_sampler import _next_parts, _Row, make_torch_sampler

END = 0
RAGGED = [[5, 2, 3], [1], [4, 4, 6, 1, 2, 7], [3, 5]]
GREEDY = SamplingParams(10, temperature=0.0)


def config(architecture: str, vocabulary: int) -> PreTrainedConfig:
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common: dict[str, Any] = {"vocab_size": vocabulary, "initializer_range": 0.5, **tokens}
    if architecture == "gpt2":  # learned positions
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common)
    common |= {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    common |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if architecture == "mistral":  # every layer sees the last 3 tokens
        return MistralConfig(sliding_window=3, **common)
    if architecture == "gemma2":  # windows and full attention take turns, logits are capped
        return Gemma2Config(sliding_window=3, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False, **common)
    if architecture == "falcon_h1":  # attention and a recurrent state in every layer
        recurrent: dict[str, Any] = {"mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
        return FalconH1Config(mamba_d_ssm=16, **recurrent, **common)
    return LlamaConfig(**common)


def tiny(architecture: str, vocabulary: int = 8) -> Any:
    """A random float64 model whose distributions are far from uniform and depend on positions and on the past."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config(architecture, vocabulary)).double().eval()
    final_norm = {"llama": "model.norm", "gpt2": "transformer.ln_f"}.get(architecture)
    if final_norm:
        model.get_submodule(final_norm).weight.data.mul_(0.5)  # halves the logits: no completion has it all
    return model


class Counting(nn.Module):
    """Says t + 1 after t, with certainty. No config, no cache, no positions; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(12).roll(1, dims=1).log())
        self.seen: list[list[list[int]]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.seen.append(input_ids.tolist())
        return SimpleNamespace(logits=self.table[input_ids])


def embedded_shapes(model: Any) -> list[tuple[int, ...]]:
    """The (rows, tokens) of every forward to come, gathered at the embedding; the model has been probed before."""
    can_share(model)
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    return shapes


def ids(groups: Sequence[Sequence[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in group] for group in groups]


# --- the distribution ---------------------------------------------------------------------------------------------


def filtered(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probabilities that temperature, top-k and top-p leave, token by token from the definitions."""
    p_V = np.exp((logits_V - logits_V.max()) / params.temperature)
    order = np.argsort(-p_V)
    if params.top_k:
        p_V[order[params.top_k :]] = 0
    p_V /= p_V.sum()
    reached = 0.0
    for token in order:
        if reached >= params.top_p:
            p_V[token] = 0
        reached += p_V[token]
    return p_V / p_V.sum()


@torch.no_grad()
def enumerated(model: Any, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every completion, by plain forwards: no cache, no padding, no positions given."""
    ended: dict[tuple[int, ...], float] = {}
    going_on = {(): 1.0}
    for _ in range(params.max_new_tokens):
        inputs = torch.tensor([[*prompt, *prefix] for prefix in going_on])
        logits_NV = model(input_ids=inputs, use_cache=False).logits[:, -1].numpy()
        longer = {
            (*prefix, token): mass * p
            for (prefix, mass), logits_V in zip(going_on.items(), logits_NV, strict=True)
            for token, p in enumerate(filtered(logits_V, params))
            if p > 0
        }
        ended |= {sequence: mass for sequence, mass in longer.items() if sequence[-1] == END}
        going_on = {sequence: mass for sequence, mass in longer.items() if sequence[-1] != END}
    assert sum((ended | going_on).values()) == pytest.approx(1, abs=1e-12)
    return ended | going_on


def p_value(samples: Sequence[Sample], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are poured together, smallest first."""
    counts = Counter(tuple(sample.token_ids) for sample in samples)
    assert set(counts) <= set(expected), "a completion without probability was drawn"
    cells: list[list[float]] = [[0.0, 0.0]]
    for sequence, mass in sorted(expected.items(), key=lambda item: item[1]):
        if cells[-1][1] >= 5:
            cells.append([0.0, 0.0])
        cells[-1][0] += counts[sequence]
        cells[-1][1] += mass * len(samples)
    observed_C, expected_C = np.array(cells).T
    assert len(cells) > 5 and expected_C.min() >= 5
    return float(chisquare(observed_C, expected_C).pvalue)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(3), SamplingParams(3, temperature=0.7, top_p=0.9, top_k=3)],
    ids=["plain", "filtered"],
)
def test_draws_follow_the_model_over_all_completions(architecture: str, params: SamplingParams):
    model = tiny(architecture)
    sampler = TorchSampler(model, [END], max_batch_tokens=10**6)
    groups = sampler.sample(RAGGED, 4000, params, seeds=[11, 12, 13, 14])
    for prompt, samples in zip(RAGGED, groups, strict=True):
        expected = enumerated(model, prompt, params)
        assert max(expected.values()) > 8 * min(expected.values()), "a uniform model would test little"
        assert p_value(samples, expected) > 1e-3


@pytest.mark.parametrize("wrong", [{"temperature": 1.15}, {"top_k": 7}, {"top_p": 0.95}], ids=str)
def test_the_chi_square_test_sees_a_wrong_sampler(wrong: dict[str, Any]):
    model = tiny("llama")
    [samples] = TorchSampler(model, [END]).sample([RAGGED[0]], 4000, SamplingParams(3, **wrong), seeds=[11])
    assert p_value(samples, enumerated(model, RAGGED[0], SamplingParams(3))) < 1e-4


# --- what a prompt gets depends on the prompt alone ---------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_a_prompt_gets_the_same_in_any_batch(architecture: str):
    model = tiny(architecture, vocabulary=40)
    params, seeds = SamplingParams(12, temperature=1.3), [3, 1, 4, 1]

    def draw(order: Sequence[int], k: int = 5, **options: Any) -> list[list[list[int]]]:
        groups = TorchSampler(model, [END], **options).sample(
            [RAGGED[p] for p in order], k, params, seeds=[seeds[p] for p in order]
        )
        return ids(groups)

    together = draw(range(4))
    assert [draw([p])[0] for p in range(4)] == together
    assert draw([2, 0, 3, 1]) == [together[p] for p in (2, 0, 3, 1)]
    assert draw(range(4), max_batch_tokens=18) == together, "one row a batch for the longest prompt"
    assert draw(range(4), max_batch_tokens=45) == together, "groups in pieces of two and three"
    assert draw(range(4), k=2) == [group[:2] for group in together], "a larger group keeps its first members"
    assert len({tuple(sample) for sample in together[0]}) == 5, "members differ"


def test_the_seed_decides_and_nothing_else():
    sampler = TorchSampler(tiny("llama", vocabulary=40), [END])
    params = SamplingParams(12)

    def draw(*seeds: int) -> list[list[list[int]]]:
        return ids(sampler.sample([RAGGED[0]] * len(seeds), 4, params, seeds=seeds))

    first = draw(7, 7, 8)
    torch.manual_seed(99)  # the global generator plays no part
    assert draw(7, 7, 8) == first
    assert first[0] == first[1] != first[2]


# --- greedy decoding is generate's --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2", "falcon_h1"])
def test_greedy_is_what_generate_gives_each_prompt_alone(architecture: str):
    model = tiny(architecture, vocabulary=40)
    prompts = [*RAGGED, [7, 7, 7], [9, 8]]  # windows of 3: all sequences outgrow them; lengths 2 and 3 come twice
    ends = list(range(6))
    groups = TorchSampler(model, ends).sample(prompts, 2, GREEDY, seeds=range(6))
    for prompt, (one, other) in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=ends, pad_token_id=END
        )
        assert one.token_ids == other.token_ids == expected[0, len(prompt) :].tolist()
    lengths = {len(group[0].token_ids) for group in groups}
    assert len(lengths) > 1, "rows should leave the batch at different times"


def test_a_model_without_cache_reads_the_whole_sequence_again():
    model = Counting()
    groups = TorchSampler(model, []).sample([[3], [1]], 1, SamplingParams(3), seeds=[0, 0])
    assert ids(groups) == [[[4, 5, 6]], [[2, 3, 4]]]
    assert model.seen == [[[3], [1]], [[3, 4], [1, 2]], [[3, 4, 5], [1, 2, 3]]]


def test_a_model_of_unknown_make_is_never_shown_padding():
    model = Counting()
    groups = TorchSampler(model, []).sample([[3], [0, 1]], 2, SamplingParams(1), seeds=[0, 0])
    assert ids(groups) == [[[4], [4]], [[2], [2]]]
    assert model.seen == [[[3]], [[0, 1]]]


def test_a_peft_model_draws_with_its_adapter():
    model = get_peft_model(tiny("llama", vocabulary=40), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    shapes = embedded_shapes(model)
    adapted = ids(TorchSampler(model, [END]).sample(RAGGED, 3, SamplingParams(8), seeds=range(4)))
    assert shapes[0] == (4, 6) and shapes[1][1] == 1, "read once for three members, then token by token"
    with model.disable_adapter():
        assert ids(TorchSampler(model, [END]).sample(RAGGED, 3, SamplingParams(8), seeds=range(4))) != adapted
    merged = model.merge_and_unload()
    assert ids(TorchSampler(merged, [END]).sample(RAGGED, 3, SamplingParams(8), seeds=range(4))) == adapted


def test_prompt_learning_is_refused():
    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="prompt-learning"):
        TorchSampler(model, [END])


# --- where completions end ----------------------------------------------------------------------------------------


def test_end_tokens_are_kept_and_the_rest_is_truncated():
    sampler = TorchSampler(Counting(), {6, 9})
    groups = sampler.sample([[3], [6], [9], [4, 5]], 1, SamplingParams(3), seeds=[0] * 4)
    assert [group[0] for group in groups] == [
        Sample([4, 5, 6], truncated=False),  # the end token comes last, at the limit
        Sample([7, 8, 9], truncated=False),  # an end token in the prompt ends nothing
        Sample([10, 11, 0], truncated=True),
        Sample([6], truncated=False),
    ]
    [[endless]] = TorchSampler(Counting(), []).sample([[3]], 1, SamplingParams(3), seeds=[0])
    assert endless == Sample([4, 5, 6], truncated=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_is_read_once_and_finished_rows_leave(architecture: str):
    model = tiny(architecture)
    shapes = embedded_shapes(model)
    logits: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, __, output: logits.append(tuple(output.shape)))
    groups = TorchSampler(model, [END, 1]).sample(RAGGED, 6, SamplingParams(9), seeds=range(4))
    lengths = [len(sample.token_ids) for group in groups for sample in group]
    assert len(set(lengths)) > 3
    # A row is in the batch for its t-th token, t > 1, exactly if its completion is that long.
    rows = [sum(length > read for length in lengths) for read in range(1, max(lengths))]
    assert shapes == [(4, 6), *((n, 1) for n in rows)]
    assert logits == [(4, 8), *((n, 8) for n in rows)], "only the last position's logits are computed"


# --- the model is left as it was ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_flags_come_back_and_dropout_is_off_meanwhile():
    model = tiny("gpt2", vocabulary=40)  # dropout 0.1 throughout
    quiet = ids(TorchSampler(model, [END]).sample(RAGGED, 2, SamplingParams(8), seeds=range(4)))
    model.gradient_checkpointing_enable()
    model.train()
    model.transformer.h[0].eval()  # frozen on purpose
    flags = {name: module.training for name, module in model.named_modules()}
    shapes = embedded_shapes(model)
    assert ids(TorchSampler(model, [END]).sample(RAGGED, 2, SamplingParams(8), seeds=range(4))) == quiet
    assert {tokens for _, tokens in shapes[1:]} == {1}, "the cache works under gradient checkpointing"
    assert {name: module.training for name, module in model.named_modules()} == flags

    model.transformer.wte.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        TorchSampler(model, [END]).sample(RAGGED, 2, SamplingParams(8), seeds=range(4))
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_the_callers_autocast_is_respected_and_survives():
    model = tiny("llama", vocabulary=40).float()
    outputs: list[Tensor] = []
    can_share(model)  # probes the model, once, in its own precision
    hook = model.lm_head.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        groups = TorchSampler(model, [END]).sample(RAGGED, 2, SamplingParams(4), seeds=range(4))
        hook.remove()
        assert {(output.dtype, output.requires_grad) for output in outputs} == {(torch.bfloat16, False)}
        model(input_ids=torch.tensor([groups[0][0].token_ids])).logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "weights were cached without a graph"


# --- who decodes together -------------------------------------------------------------------------------------------


def rows_of(lengths: Sequence[int], limits: Sequence[Sequence[int]]) -> list[list[Any]]:
    return [[_Row(group, [1] * length, limit, 0) for limit in limits[group]] for group, length in enumerate(lengths)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    k=st.integers(1, 9),
    own=st.integers(1, 20),
    room=st.integers(1, 400),
    shares=st.booleans(),
    data=st.data(),
)
def test_every_member_decodes_once_within_the_room(
    lengths: list[int], k: int, own: int, room: int, shares: bool, data: st.DataObject
):
    def positions(rows: Sequence[Any]) -> int:
        longest = max(len(row.prompt) for row in rows)
        if shares:  # the prompts of the parts, each padded to the longest, and every row's own tokens
            return len({(row.group, row.part) for row in rows}) * longest + len(rows) * own
        return len(rows) * (longest + own)

    reader = make_reader(tiny("llama"), None) if shares else PlainReader(tiny("llama"))
    waiting = rows_of(lengths, [[own] * k] * len(lengths))
    live: list[Any] = []
    seen: list[Any] = []
    while live or waiting:
        parts = _next_parts(reader, live, waiting, room)
        assert parts or live, "nothing would ever go on"
        assert shares or not (parts and live), "rows joined others that were on their way"
        for part in parts:
            alone = rows_of([len(part[0].prompt)], [[own] * k])[0]
            assert len(part) == k or positions(alone) > room, "a group that fits was split"
            seen += part
        live += [row for part in parts for row in part]
        assert len(live) == 1 or positions(live) <= room
        leaving = data.draw(st.sets(st.sampled_from(range(len(live))), min_size=1))
        live = [row for number, row in enumerate(live) if number not in leaving]
    assert sorted(map(id, seen)) == sorted({id(row) for row in seen}) and len(seen) == k * len(lengths)


def test_rooms_are_filled():
    # 3 members * 4 tokens + the prompt = 14 a group of prompts of 2: two fit 40, and a third no longer beside 8s.
    waiting = rows_of([2, 8, 2, 2][::-1], [[4] * 3] * 4)
    waiting.sort(key=lambda rows: len(rows[0].prompt), reverse=True)
    parts = _next_parts(make_reader(tiny("llama"), None), [], waiting, 43)
    assert [len(part[0].prompt) for part in parts] == [2, 2, 2] and len(waiting) == 1
    waiting = rows_of([2, 2, 2], [[4] * 3] * 3)  # without sharing 3 * (2 + 4) = 18 a group
    assert len(_next_parts(PlainReader(tiny("llama")), [], waiting, 40)) == 2


def test_waiting_prompts_take_the_places_of_rows_that_end():
    model = tiny("llama")
    prompts = [[5, 2, 3], [1, 4, 4], [6, 1, 2], [7, 3, 5]]
    together = ids(TorchSampler(model, [END, 1]).sample(prompts, 2, SamplingParams(9), seeds=range(4)))
    shapes = embedded_shapes(model)
    # A prompt of 3 with 2 rows of at most 9 takes 21 places: two groups go together.
    sampler = TorchSampler(model, [END, 1], max_batch_tokens=45)
    assert ids(sampler.sample(prompts, 2, SamplingParams(9), seeds=range(4))) == together
    assert shapes[0] == (2, 3)
    joined = [n for n in range(2, len(shapes) - 1) if shapes[n][1] == 3 and shapes[n + 1][0] > 2 * shapes[n][0]]
    assert joined, "no prompt joined rows that were on their way"


@pytest.mark.parametrize("kept", [[], [True], [False], [False, True], [True, False, True, True, False, True]])
def test_holes_are_filled_from_the_end(kept: list[bool]):
    order = fill_holes(kept)
    assert sorted(order) == [place for place, stays in enumerate(kept) if stays]
    assert all(order[place] == place for place in range(len(order)) if kept[place]), "a row moved that could stay"


# --- low precision --------------------------------------------------------------------------------------------------


def test_a_copy_in_another_dtype_draws_and_goes(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", vocabulary=40).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs: list[torch.dtype] = []
    assert can_share(model)  # measured here, with the weights themselves
    read = SharedPrefixReader.read

    def noting(reader: SharedPrefixReader, tokens_N: Tensor) -> Tensor:
        logits_NV = read(reader, tokens_N)
        outputs.append(logits_NV.dtype)
        return logits_NV

    monkeypatch.setattr(SharedPrefixReader, "read", noting)
    drawn = ids(TorchSampler(model, [END], dtype=torch.bfloat16).sample(RAGGED, 3, SamplingParams(8), seeds=range(4)))
    assert set(outputs) == {torch.bfloat16}
    exact = ids(TorchSampler(model, [END]).sample(RAGGED, 3, SamplingParams(8), seeds=range(4)))
    same = [one == other for p, q in zip(drawn, exact, strict=True) for one, other in zip(p, q, strict=True)]
    assert sum(same) > len(same) / 2, "rounded weights draw almost the same"
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computes", [True, False])
def test_the_processor_and_the_weights_choose_what_to_draw_in(
    weights: torch.dtype, computes: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_sampler, "computes_bfloat16", lambda device: computes)
    model = tiny("llama").to(weights)
    copied = torch.bfloat16 if computes and weights == torch.float32 else None
    assert make_torch_sampler(model, None, "auto").dtype == copied
    assert make_torch_sampler(model, None, "float32").dtype == torch.float32


def test_rotary_frequencies_keep_their_precision():
    model = tiny("llama").float()
    reader = reading_copy(model, torch.bfloat16)
    assert {p.dtype for p in reader.parameters()} == {torch.bfloat16}
    assert torch.equal(reader.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert reading_copy(model).lm_head.weight is model.lm_head.weight


# --- which models share their prompts -------------------------------------------------------------------------------


def test_models_that_share_their_prompts():
    shares = {name: can_share(tiny(name)) for name in ("llama", "gpt2", "mistral", "gemma2", "falcon_h1")}
    assert shares == {"llama": True, "gpt2": True, "mistral": False, "gemma2": False, "falcon_h1": False}
    assert not can_share(Counting())


@pytest.mark.parametrize("extra", [{}, {"softcap": 50.0}, {"s_aux": 0}, {"position_bias": 0}, {"sliding_window": 3}])
def test_attention_that_is_not_computed_here_is_refused(extra: dict[str, Any]):
    # Soft caps hardly show on a probe: that they are asked for decides.
    reader = make_reader(tiny("llama"), None) if extra else None
    states = torch.ones(1, 1, 1, 8)
    with pytest.raises(Unsupported):
        _attend(SimpleNamespace(layer_idx=0), states, states, states, None, shared_prefix=reader, **extra)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "k", "tokens", "seeds", "message"),
    [
        ([[1, 2]], 2, 4, [], "1 prompts but 0 seeds"),
        ([[1, 2]], 0, 4, [0], "num_generations is 0"),
        ([[1], []], 2, 4, [0, 0], "prompt 1 has no tokens"),
        (
            [[1] * 30],
            2,
            3,
            [0],
            r"prompt 0 has 30 tokens, .*max_new_tokens=3 .* 33, more than the model's 32 positions",
        ),
        ([[1], [1] * 20], 2, 3, [0, 0], r"prompt 1 has 20 tokens, .* 23, more than max_batch_tokens=22"),
    ],
)
def test_mistakes_are_told_before_the_model_runs(
    prompts: list[list[int]], k: int, tokens: int, seeds: list[int], message: str
):
    model = tiny("gpt2")
    shapes = embedded_shapes(model)
    limit = 22 if "max_batch_tokens" in message else None
    with pytest.raises(UserError, match=message):
        TorchSampler(model, [END], max_batch_tokens=limit).sample(prompts, k, SamplingParams(tokens), seeds=seeds)
    assert shapes == []


def test_the_last_position_can_be_used():
    [[sample]] = TorchSampler(tiny("gpt2"), []).sample([[1] * 29], 1, SamplingParams(3), seeds=[0])
    assert len(sample.token_ids) == 3


def test_no_prompts_give_no_groups():
    assert TorchSampler(tiny("llama"), [END]).sample([], 4, SamplingParams(3), seeds=[]) == []
