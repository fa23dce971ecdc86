"""The whole algorithm in one file: Group Variance Policy Optimization with the library's public pieces.

    python examples/minimal.py [MODEL] [UPDATES]

MODEL is anything load_model takes; by default the embedded SmolLM2-135M-Instruct. The trainer does the same with
several updates a rollout, schedules, evaluation, checkpoints and several processes.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import torch

from gvpo import (
    Completion,
    Group,
    SamplingParams,
    TorchSampler,
    accumulate_gradients,
    load_model,
    sequence_logprobs,
)
from gvpo.models.encoding import encode_prompt, end_token_ids

BETA, GROUPS, MEMBERS, LEARNING_RATE = 0.1, 8, 8, 4e-5


def make_prompt(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10, 100), 2)
    return f"Which number is larger, {a} or {b}? The larger number is", str(max(a, b))


def reward(text: str, answer: str) -> float:
    return float(text.strip().startswith(answer)) - 0.01 * len(text.strip())


def main(model_name: str = "smollm2-135m", updates: int = 20) -> list[float]:
    """Train, print the mean reward of every update, and return these means."""
    rng = random.Random(0)
    model, tokenizer = load_model(model_name)
    assert tokenizer is not None, "the folder has no tokenizer"
    sampler = TorchSampler(model, end_token_ids(model, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    means = []
    for update in range(updates):
        # Prompts, and completions drawn from the policy as it is now.
        prompts = [make_prompt(rng) for _ in range(GROUPS)]
        prompt_ids = [encode_prompt(prompt, tokenizer) for prompt, _ in prompts]
        drawn = sampler.sample(
            prompt_ids, MEMBERS, SamplingParams(max_new_tokens=8), seeds=[rng.getrandbits(63) for _ in prompts]
        )
        # Groups with rewards: the unit of everything.
        groups = []
        for (prompt, answer), ids, samples in zip(prompts, prompt_ids, drawn, strict=True):
            members = []
            for sample in samples:
                text = str(tokenizer.decode(sample.token_ids, skip_special_tokens=True))
                members.append(
                    Completion(text, sample.token_ids, reward=reward(text, answer), truncated=sample.truncated)
                )
            groups.append(Group(prompt, members, prompt_ids=ids))
        # The reference is the policy that drew the groups (Algorithm 1): score every member before the update.
        with torch.no_grad():
            reference = iter(sequence_logprobs(model, groups, token_budget=2048).tolist())
        groups = [
            replace(group, completions=[replace(one, ref_logprob=next(reference)) for one in group.completions])
            for group in groups
        ]
        # Centred implicit rewards are regressed onto centred rewards.
        accumulate_gradients(model, groups, beta=BETA, token_budget=2048)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(one.reward or 0.0 for group in groups for one in group.completions) / (GROUPS * MEMBERS))
        print(f"update {update + 1:3d}  mean reward {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m",
        int(sys.argv[2]) if len(sys.argv) > 2 else 20,
    )
