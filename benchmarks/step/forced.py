"""The same work for every system: the model, prompts of exactly so many tokens, completions of prescribed lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from cases import SEED, Case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from gvpo import load_model

_WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face level office door health person art war
"""


def make_model(case: Case) -> tuple[Any, Any]:
    """The case's model in float32, and its tokenizer; a random one has none."""
    if case.model is None:
        return load_model("smollm2-135m")
    torch.manual_seed(SEED)
    heads = case.model.hidden // 64
    config = LlamaConfig(
        hidden_size=case.model.hidden,
        intermediate_size=3 * case.model.hidden,
        num_hidden_layers=case.model.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        vocab_size=case.model.vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), None


def make_prompts(case: Case, tokenizer: Any) -> tuple[list[str], list[list[int]]]:
    """Texts, and their token ids: exactly `prompt_tokens` each. Without a tokenizer the texts are empty."""
    numbers = random.Random(SEED)
    if tokenizer is None:
        assert case.model is not None
        count = case.model.vocabulary
        ids = [[numbers.randrange(3, count) for _ in range(case.prompt_tokens)] for _ in range(case.prompts)]
        return [""] * case.prompts, ids
    words = _WORDS.split()
    texts = ["".join(f" {numbers.choice(words)}" for _ in range(case.prompt_tokens)) for _ in range(case.prompts)]
    ids = tokenizer(text=texts)["input_ids"]
    assert all(len(one) == case.prompt_tokens for one in ids), "a word of the prompts is not one token"
    assert len(set(texts)) == case.prompts
    return texts, ids


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """In [0, 1), different for almost every completion, so that no member of a group can be left out."""
    return [sum((place + 1) * token for place, token in enumerate(ids)) * 7919 % 1009 / 1009 for ids in completion_ids]


class ForcedEnds(LogitsProcessor):
    """Row n of `model.generate` gets an end token as its lengths[n]-th token, and none before."""

    def __init__(self, lengths: Sequence[int], prompts: Sequence[Sequence[int]], end_ids: Sequence[int]) -> None:
        self.lengths_N = torch.tensor(lengths)
        self.prompts_NT = torch.tensor(prompts)
        self.end_ids = list(end_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        place = input_ids.shape[1] - self.prompts_NT.shape[1] + 1  # of the token that is drawn next, from 1
        assert torch.equal(input_ids[:, : self.prompts_NT.shape[1]], self.prompts_NT), "rows in another order"
        scores[:, self.end_ids] = -torch.inf
        ends = self.lengths_N <= place
        scores[ends] = -torch.inf
        scores[ends, self.end_ids[0]] = 0.0
        return scores


def force_generate(model: Any, case: Case, prompts: Sequence[Sequence[int]], end_ids: Sequence[int]) -> None:
    """Have the model's `generate` end as the case prescribes; rows must be prompt by prompt, member by member."""
    lengths = [length for group in case.lengths for length in group]
    rows = [prompt for prompt in prompts for _ in range(case.k)]
    forced = LogitsProcessorList([ForcedEnds(lengths, rows, end_ids)])
    generate = model.generate
    model.generate = lambda *given, **named: generate(*given, **named, logits_processor=forced)


def force_sampler(case: Case, prompts: Sequence[Sequence[int]]) -> None:
    """Have every TorchSampler of this process draw as many tokens as the case prescribes."""
    from gvpo.sampling.torch_sampler import TorchSampler

    lengths = {tuple(prompt): lengths for prompt, lengths in zip(prompts, case.lengths, strict=True)}
    assert hasattr(TorchSampler, "_limits")
    TorchSampler._limits = lambda self, prompts, num_generations, params: [lengths[tuple(one)] for one in prompts]


def check_lengths(case: Case, completion_ids: Sequence[Sequence[int]]) -> None:
    """Refuse a step that did other work than prescribed, in whatever order its completions are."""
    got, wanted = sorted(map(len, completion_ids)), sorted(length for group in case.lengths for length in group)
    if got != wanted:
        raise AssertionError(f"completions of {got} tokens, not of {wanted}")
