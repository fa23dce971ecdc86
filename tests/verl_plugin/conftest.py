"""Fixtures for verl on a CPU: a tiny model with a character tokenizer, its data, and the environment of a run."""

from __future__ import annotations

import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# These have an environment of their own: make test-verl.
collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]
CHARACTERS = [*"0123456789+-=? :abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random Llama of 23,000 weights whose tokens are characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {token: number for number, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    made = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Sums, as verl reads them."""
    import pandas

    numbers = random.Random(0)
    rows = []
    for index in range(32):
        a, b = numbers.randint(0, 9), numbers.randint(0, 9)
        rows.append(
            {
                "data_source": "toy",
                "prompt": [{"role": "user", "content": f"{a}+{b}="}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"index": index},
            }
        )
    made = tmp_path_factory.mktemp("data") / "toy.parquet"
    pandas.DataFrame(rows).to_parquet(made)
    return made


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """verl on a CPU, and nothing that leaves this machine."""
    return os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,hugging_face_rollout",
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
