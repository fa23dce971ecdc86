"""Tiny models, data and rewards for the tests of the trainer: no text, no network, milliseconds an update."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gvpo.groups import Completion, Group
from gvpo.training.config import GVPOConfig
from gvpo.training.loop import GVPOTrainer

VOCABULARY, END = 16, 15
LETTERS = "abcdefghijklm "
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}~{% endfor %}"


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of about 4000 parameters in float32."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def letters_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a letter (ids 0 to 13), and "~" (15), the end token."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"?": len(LETTERS), "~": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="~", unk_token="?", chat_template=chat_template
    )


def settings(**overrides: Any) -> GVPOConfig:
    """A config for small quick runs: 2 groups of 3 an update, 2 updates a rollout."""
    values = {
        "num_generations": 3,
        "max_completion_length": 4,
        "groups_per_update": 2,
        "updates_per_rollout": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        **overrides,
    }
    return GVPOConfig(**values)


def prompts(count: int = 6) -> list[dict[str, Any]]:
    """Rows with a prompt alone, as ids, and a column; no two alike."""
    return [{"prompt_ids": [1 + n % 13, n // 13], "target": n % 5} for n in range(count)]


def first_token(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """A reward that varies: the first token, over the vocabulary."""
    return [ids[0] / VOCABULARY for ids in completion_ids]


def offline_groups(count: int = 4, seed: int = 0, *, sizes: Sequence[int] = (3, 2, 4)) -> list[Group]:
    """Ragged groups of random ids with random rewards; sizes are used in turn."""
    draw = random.Random(seed)
    return [
        Group(
            None,
            [_completion(draw) for _ in range(sizes[n % len(sizes)])],
            prompt_ids=[draw.randrange(END) for _ in range(draw.randint(1, 5))],
            columns={"target": n},
        )
        for n in range(count)
    ]


def _completion(draw: random.Random) -> Completion:
    ids = [draw.randrange(END) for _ in range(draw.randint(1, 6))] + [END]
    return Completion(None, ids, reward=draw.random(), source="dataset")


def run(model: Any, data: Any, rewards: Any = None, **kwargs: Any) -> GVPOTrainer:
    """A trainer that has trained; keywords that GVPOTrainer does not take go into its config."""
    own = {name: kwargs.pop(name) for name in ("tokenizer", "eval_dataset", "sources") if name in kwargs}
    trainer = GVPOTrainer(model, data, rewards, config=settings(**kwargs), **own)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, on the CPU wherever the model is."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models' parameters are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def naive_logprob(model: nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """log pi(y|x) from one plain forward in float64, on a copy."""
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = double(torch.tensor([prompt_ids + completion_ids])).logits[0]
    logps = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return math.fsum(float(logps[place, token]) for place, token in enumerate(completion_ids))
