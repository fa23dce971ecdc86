"""Held-out prompts, answered greedily, and what their rewards come to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gvpo.groups import Completion, Group
from gvpo.models.encoding import completed
from gvpo.rewards.fill import function_rewards
from gvpo.sampling.sampler import Sampler, SamplingParams
from gvpo.sources.dataset import Row
from gvpo.sources.policy import PolicySource


def answer_greedily(rows: Sequence[Row], sampler: Sampler, tokenizer: Any | None, max_new_tokens: int) -> list[Group]:
    """One greedy completion for every prompt, as groups of one, in order."""
    source = PolicySource(sampler, tokenizer, SamplingParams(max_new_tokens, temperature=0.0))
    answers = source.fill(rows, [1] * len(rows), [0] * len(rows))
    return [completed(row.group(members), tokenizer) for row, members in zip(rows, answers, strict=True)]


def evaluation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward, mean of every function, lengths, shares: plain means over the answers that have the quantity."""
    answers: list[Completion] = [completion for group in groups for completion in group.completions]
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    row = {"eval/reward": fmean(rewards)} if rewards else {}
    by_function: list[dict[str, float]] = [function_rewards(answer) for answer in answers]
    for name in sorted({name for scores in by_function for name in scores}):
        values = [scores[name] for scores in by_function if name in scores]
        row[f"eval/rewards/{name}/mean"] = fmean(values)
    row["eval/unscored"] = len(answers) - len(rewards)
    row["eval/completions/mean_length"] = fmean(len(answer.token_ids or []) for answer in answers)
    row["eval/completions/truncated"] = fmean(answer.truncated for answer in answers)
    return row
