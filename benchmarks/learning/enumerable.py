"""A transformer with 8 prompts of 400 answers each, where what a run reached is summed, not sampled.

Two tasks, a new one for every seed: `graded`, rewards uniform in [0, 1]; `rare`, reward 1 for 20 of the 400 answers of
each prompt and 0 for the others, so that a fresh model gets about 5 %.
"""

from __future__ import annotations

from itertools import product
from statistics import fmean
from typing import Any

import torch
from cells import Run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gvpo import GVPOConfig, GVPOTrainer

VOCABULARY, LONGEST, END = 8, 3, 7
PROMPTS = [[END, first, second] for first, second in product(range(2), range(4))]
ANSWERS = [
    [*body, *end]
    for length, end in ((0, [END]), (1, [END]), (2, [END]), (3, []))
    for body in product(range(END), repeat=length)
]
"""All 400: 1 + 7 + 49 that end, 343 cut off at the limit."""


def run(run: Run) -> dict[str, float]:
    """Train, and sum up where the policy ended: its reward, its distance from the start and from the optimum."""
    cell = run.cell
    rewards_PA = make_rewards(cell.task, run.seed)
    reward_of = {
        (tuple(prompt), tuple(answer)): float(rewards_PA[p, a])
        for (p, prompt), (a, answer) in product(enumerate(PROMPTS), enumerate(ANSWERS))
    }

    def reward(completion_ids: list[list[int]], prompt_key: list[list[int]], **columns: Any) -> list[float]:
        return [reward_of[tuple(key), tuple(ids)] for key, ids in zip(prompt_key, completion_ids, strict=True)]

    model = make_model(run.seed)
    start_PA = exact_logprobs(model)
    config = GVPOConfig(**run.settings(), max_completion_length=LONGEST, token_budget=None)
    rows = [{"prompt_ids": prompt, "prompt_key": prompt} for prompt in PROMPTS]
    trainer = GVPOTrainer(model, rows, reward, config=config)
    trainer.train()
    end_PA = exact_logprobs(model)
    optimum_PA = (start_PA + rewards_PA / (cell.beta or 0.1)).log_softmax(-1)
    return {
        "before": float((start_PA.exp() * rewards_PA).sum(-1).mean()),
        "after": float((end_PA.exp() * rewards_PA).sum(-1).mean()),
        "during": fmean(row["reward"] for row in trainer.history),
        "kl": float((end_PA.exp() * (end_PA - start_PA)).sum(-1).mean()),
        "distance": float((end_PA.exp() - optimum_PA.exp()).abs().sum(-1).mean() / 2),
        "largest_log_ratio": max(row["log_ratio/max"] for row in trainer.history),
    }


def make_rewards(task: str, seed: int) -> Tensor:
    """rewards_PA, float64."""
    random = torch.Generator().manual_seed(seed)
    scores_PA = torch.rand(len(PROMPTS), len(ANSWERS), dtype=torch.float64, generator=random)
    if task == "graded":
        return scores_PA
    return (scores_PA.argsort(-1).argsort(-1) < 20).double()


def make_model(seed: int) -> LlamaForCausalLM:
    """A random two-layer Llama, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def exact_logprobs(model: torch.nn.Module) -> Tensor:
    """log pi(answer | prompt) of every answer, (P, A), float64: one forward over all longest contexts."""
    stems = list(product(range(END), repeat=LONGEST - 1))
    rows = torch.tensor([[*prompt, *stem] for prompt in PROMPTS for stem in stems])
    logps = model(rows).logits[:, len(PROMPTS[0]) - 1 :].double().log_softmax(-1)
    logps = logps.unflatten(0, (len(PROMPTS), len(stems)))
    place = {stem: number for number, stem in enumerate(stems)}
    columns = []
    for answer in ANSWERS:
        body = [token for token in answer if token != END]
        row = place[tuple((body + [0] * LONGEST)[: LONGEST - 1])]
        columns.append(sum(logps[:, row, step, token] for step, token in enumerate(answer)))
    return torch.stack(columns, dim=1)  # pyright: ignore[reportArgumentType, reportCallIssue]
