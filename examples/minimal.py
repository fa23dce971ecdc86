"""The whole algorithm in one file: Group Variance Policy Optimization with the library's public pieces.

    python examples/minimal.py [MODEL] [ROLLOUTS]

MODEL is anything load_model takes; by default the embedded SmolLM2-135M-Instruct. The trainer adds schedules,
evaluation, checkpoints, metrics and several processes.
"""

from __future__ import annotations

import random
import sys

import torch

from gvpo import (
    Completion,
    Group,
    SamplingParams,
    TorchSampler,
    accumulate_gradients,
    encode_prompt,
    end_token_ids,
    load_model,
    sequence_logprobs,
)

BETA, GROUPS, MEMBERS, UPDATES_PER_ROLLOUT, LEARNING_RATE = 0.1, 8, 8, 2, 3e-5


def make_prompt(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10, 100), 2)
    return f"Which number is larger, {a} or {b}? The larger number is", str(max(a, b))


def reward(text: str, answer: str) -> float:
    return float(text.strip().startswith(answer)) - 0.01 * len(text.strip())


def main(model_name: str = "smollm2-135m", rollouts: int = 10) -> list[float]:
    """Train, print the mean reward of every rollout, and return these means."""
    rng = random.Random(0)
    model, tokenizer = load_model(model_name)
    assert tokenizer is not None, "the folder has no tokenizer"
    sampler = TorchSampler(model, end_token_ids(model, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    means = []
    for rollout in range(rollouts):
        # Prompts, and completions drawn from the policy as it is now.
        prompts = [make_prompt(rng) for _ in range(GROUPS * UPDATES_PER_ROLLOUT)]
        prompt_ids = [encode_prompt(prompt, tokenizer) for prompt, _ in prompts]
        seeds = [rng.getrandbits(63) for _ in prompts]
        drawn = sampler.sample(prompt_ids, MEMBERS, SamplingParams(max_new_tokens=8), seeds=seeds)

        # Groups with rewards: the unit of everything.
        groups = []
        for (prompt, answer), ids, samples in zip(prompts, prompt_ids, drawn, strict=True):
            members = []
            for one in samples:
                text = str(tokenizer.decode(one.token_ids, skip_special_tokens=True))
                members.append(Completion(text, one.token_ids, reward=reward(text, answer), truncated=one.truncated))
            groups.append(Group(prompt, members, prompt_ids=ids))

        # The reference is the policy that drew the groups (Algorithm 1): score every member before the first update.
        with torch.no_grad():
            logps = iter(sequence_logprobs(model, groups, token_budget=2048).tolist())
        for group in groups:
            for completion in group.completions:
                completion.ref_logprob = next(logps)

        # Centred implicit rewards are regressed onto centred rewards, a part of the groups at a time.
        for start in range(0, len(groups), GROUPS):
            accumulate_gradients(model, groups[start : start + GROUPS], beta=BETA, token_budget=2048)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        rewards = [one.reward for group in groups for one in group.completions if one.reward is not None]
        means.append(sum(rewards) / len(rewards))
        print(f"rollout {rollout + 1:3d}  mean reward {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0] if arguments else "smollm2-135m", rollouts=int(arguments[1]) if len(arguments) > 1 else 10)
