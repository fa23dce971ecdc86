"""The trainer itself reaches the closed-form optimum pi_ref * exp(R / beta) / Z on a model that can be enumerated."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exact import END, LONGEST, PROMPT, all_sequences, exact_logprobs, tiny_llama, total_variation
from gvpo import Completion, Group, GVPOConfig, GVPOTrainer

BETA = 0.3
SEQUENCES = all_sequences()
REWARDS = torch.rand(len(SEQUENCES), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REWARD_OF = {tuple(ids): float(reward) for ids, reward in zip(SEQUENCES, REWARDS, strict=True)}


UPDATES, MEMBERS = 1000, 32


def train(**settings: Any) -> tuple[float, float]:
    """Train a fresh model; total variation to the closed-form optimum before and after."""
    data, rewards = settings.pop("data"), settings.pop("reward_funcs", None)
    model = tiny_llama()
    start = exact_logprobs(model)
    optimum = (start + REWARDS / BETA).log_softmax(0)
    common = {
        "beta": BETA,
        "reference": "initial",
        "learning_rate": 3e-3,
        "max_steps": UPDATES,
        "num_generations": MEMBERS,
        "groups_per_update": 1,
        "updates_per_rollout": 5,
        "max_completion_length": LONGEST,
        "disable_tqdm": True,
    }
    own = {name: settings.pop(name) for name in ("sources", "tokenizer") if name in settings}
    GVPOTrainer(model, data, rewards, config=GVPOConfig(**common | settings), **own).train()
    return total_variation(start, optimum), total_variation(exact_logprobs(model), optimum)


def offline_groups(probabilities: Sequence[float] | None = None) -> list[Group]:
    """Groups drawn uniformly over sequences, or with these probabilities, with their rewards."""
    draws = random.Random(0)
    return [
        Group(
            None,
            [
                Completion(token_ids=ids, reward=REWARD_OF[tuple(ids)], truncated=ids[-1] != END, source="dataset")
                for ids in draws.choices(SEQUENCES, probabilities, k=MEMBERS)
            ],
            prompt_ids=PROMPT,
        )
        for _ in range(UPDATES)
    ]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One letter for each token but the end token, which has none in texts."""
    vocabulary = {letter: index for index, letter in enumerate("abcdefg")} | {"~": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~")


def reward(*, prompts: None, completions: None, completion_ids: list[list[int]], **columns: object) -> list[float]:
    assert prompts is None
    assert completions is None
    return [REWARD_OF[tuple(ids)] for ids in completion_ids]


def test_there_are_400_sequences_and_their_probabilities_sum_to_one() -> None:
    assert len(SEQUENCES) == 1 + 7 + 49 + 343
    assert float(exact_logprobs(tiny_llama()).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_offline_groups_drawn_uniformly_reach_the_optimum() -> None:
    before, after = train(data=offline_groups())
    assert before > 0.3
    assert after < 0.03


def test_the_policys_own_rollouts_reach_the_optimum() -> None:
    before, after = train(data=[{"prompt_ids": PROMPT}], reward_funcs=reward)
    assert before > 0.3
    assert after < 0.03


def test_offline_groups_of_a_different_model_reach_the_optimum() -> None:
    # Flat enough for every sequence to be drawn 20 times on average: what is never seen cannot be fitted.
    other = exact_logprobs(tiny_llama(1, scale=0.3))
    assert float(other.exp().min()) * UPDATES * MEMBERS > 20
    assert total_variation(other, exact_logprobs(tiny_llama())) > 0.3
    before, after = train(data=offline_groups(other.exp().tolist()), learning_rate=2e-3)
    assert before > 0.3
    assert after < 0.03


def test_half_of_each_group_replayed_reaches_the_optimum() -> None:
    replay = {"type": "replay", "members": MEMBERS // 2, "capacity": 64, "priority": "uniform"}
    sources = [{"type": "policy"}, replay]
    before, after = train(data=[{"prompt_ids": PROMPT}], reward_funcs=reward, sources=sources)
    assert before > 0.3
    assert after < 0.03


def test_demonstrations_in_every_group_reach_the_optimum() -> None:
    """Four answers that are likely neither under the start nor under the optimum, in each group of 32."""
    rewarded = [ids for ids in SEQUENCES if ids[-1] == END and len(ids) == LONGEST]
    least = sorted(rewarded, key=lambda ids: REWARD_OF[tuple(ids)])[:4]
    texts = ["".join("abcdefg"[token] for token in ids[:-1]) for ids in least]
    marks = [REWARD_OF[tuple(ids)] for ids in least]
    shown = {"type": "demonstration", "column": "answer", "members": 4, "reward": "marks"}
    row = {"prompt_ids": PROMPT, "answer": texts, "marks": marks}
    options = {"sources": [{"type": "policy"}, shown], "tokenizer": words_tokenizer()}
    before, after = train(data=[row], reward_funcs=by_ids, **options)
    assert before > 0.3
    assert after < 0.03


def test_files_of_two_sampler_processes_reach_the_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw from a model that is neither start nor optimum, while the trainer follows the folder."""
    tiny_llama(1, scale=0.3).save_pretrained(tmp_path / "other")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_ids": PROMPT}) + "\n")
    half, batch = UPDATES // 2, 50
    command = [sys.executable, "-m", "gvpo", "sample", "--model", "other", "--prompts", "prompts.jsonl"]
    command += ["-k", str(MEMBERS), "--max-completion-length", str(LONGEST), "--batch", str(batch), "--out", "groups/"]
    (tmp_path / "groups").mkdir()
    command += ["--epochs", str(half), "--seed"]
    samplers = [subprocess.Popen([*command, seed], cwd=tmp_path, stdout=subprocess.DEVNULL) for seed in "12"]
    wait = time.sleep

    def wait_for_samplers(seconds: float) -> None:
        assert all(sampler.poll() in (None, 0) for sampler in samplers), "a sampler failed: nothing more will come"
        wait(seconds)

    monkeypatch.setattr("gvpo.training.run_sources.time.sleep", wait_for_samplers)
    source = {"type": "files", "path": str(tmp_path / "groups"), "follow": True}
    before, after = train(data=None, reward_funcs=reward, sources=source, learning_rate=2e-3)
    assert [sampler.wait() for sampler in samplers] == [0, 0]
    assert len(list((tmp_path / "groups").iterdir())) == 2 * half // batch
    assert before > 0.3
    assert after < 0.03


def by_ids(*, completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [REWARD_OF[tuple(ids)] for ids in completion_ids]


def test_another_beta_ends_somewhere_else() -> None:
    """The bound is one that a mistake of a third in the scale of the reward term does not meet."""
    start = exact_logprobs(tiny_llama())
    optimum, other = ((start + REWARDS / beta).log_softmax(0) for beta in (BETA, 0.75 * BETA))
    assert total_variation(optimum, other) > 0.03
