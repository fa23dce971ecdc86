"""SmolLM2-135M on tasks that reasoning-gym makes and scores: what a run reached on held-out prompts.

The assistant's turn is begun for it ("3 + 4 =", "Lily is James's"), so that the untrained model answers some of the
prompts; what it has to learn is to say no more than the answer, and to get it right. bfloat16 autocast over float32
weights, which halves the time on a processor that has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import fmean
from typing import Any

import reasoning_gym
import torch
from cells import Run

from gvpo import GVPOConfig, GVPOTrainer, SamplingParams, encode_prompt, load_model

TRAIN, HELD_OUT, LONGEST, SAMPLES = 500, 100, 8, 4
SYSTEM = {"role": "system", "content": "You answer briefly."}


@dataclass(frozen=True)
class Task:
    """A reasoning-gym data set; begin: from an entry to the words with which the answer begins; asked: entries kept."""

    name: str
    settings: dict[str, int]
    begin: Callable[[dict[str, Any]], str]
    asked: Callable[[dict[str, Any]], bool] = lambda entry: True


def _relation(entry: dict[str, Any]) -> str:
    return "{person1} is {person2}'s".format(**entry["metadata"])


def _sum(entry: dict[str, Any]) -> str:
    return entry["question"].strip().rpartition(": ")[2]


TASKS = {
    "family": Task(
        "family_relationships",
        {"min_family_size": 3, "max_family_size": 4},
        _relation,
        # One word each: husband, wife, father, mother, son, daughter, ...
        lambda entry: "-" not in entry["answer"],
    ),
    "sums": Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, _sum),
}


def run(run: Run) -> dict[str, float]:
    """Train, and answer the held-out prompts: drawn, which is what training raises, and greedily."""
    config = GVPOConfig(**run.settings(), max_completion_length=LONGEST, bf16=True)
    train, held_out = rows(run.cell.task)
    model, tokenizer = start()
    trainer = GVPOTrainer(copy.deepcopy(model), train, exact, config=config, tokenizer=tokenizer, eval_dataset=held_out)
    trainer.train()
    return {
        "after": sampled(trainer, held_out),
        "greedy": trainer.history[-1]["eval/reward"],
        "during": fmean(row["reward"] for row in trainer.history),
        "largest_log_ratio": max(row["log_ratio/max"] for row in trainer.history),
    }


@cache
def start() -> tuple[Any, Any]:
    """The untrained model and its tokenizer."""
    return load_model("smollm2-135m")


@torch.no_grad()
def sampled(trainer: GVPOTrainer, held_out: list[dict[str, Any]]) -> float:
    """Mean reward of four answers to each held-out prompt, at temperature 1."""
    prompts = [encode_prompt(row["prompt"], trainer.tokenizer) for row in held_out]
    with torch.autocast("cpu", torch.bfloat16):
        drawn = trainer.sampler.sample(prompts, SAMPLES, SamplingParams(LONGEST), seeds=range(len(prompts)))
    completions = [
        [{"role": "assistant", "content": trainer.tokenizer.decode(one.token_ids, skip_special_tokens=True)}]
        for answers in drawn
        for one in answers
    ]
    asked = [row for row in held_out for _ in range(SAMPLES)]
    return fmean(exact(completions, [row["entry"] for row in asked], [row["task"] for row in asked]))


def exact(
    completions: list[list[dict[str, str]]], entry: list[dict[str, Any]], task: list[str], **_: Any
) -> list[float]:
    """1 where reasoning-gym gives the whole answer, but for its last full stop, full marks; else 0."""
    return [
        float(_scorer(name).score_answer(messages[-1]["content"].strip().removesuffix("."), one) == 1)
        for messages, one, name in zip(completions, entry, task, strict=True)
    ]


@cache
def rows(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows; no question is in both, nor in the held-out ones twice."""
    made = reasoning_gym.create_dataset(TASKS[task].name, size=2000, seed=0, **TASKS[task].settings)
    by_question: dict[str, list[dict[str, Any]]] = {}
    for entry in made:
        if TASKS[task].asked(entry):
            by_question.setdefault(entry["question"], []).append(_row(task, entry))
    held_out = [entries[0] for entries in islice(by_question.values(), HELD_OUT)]
    train = [row for entries in islice(by_question.values(), HELD_OUT, None) for row in entries]
    return train[:TRAIN], held_out


@cache
def _scorer(task: str) -> Any:
    return reasoning_gym.create_dataset(TASKS[task].name, size=1, seed=0, **TASKS[task].settings)


def _row(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    user = {"role": "user", "content": entry["question"].strip()}
    begun = {"role": "assistant", "content": TASKS[task].begin(entry)}
    kept = {"question": entry["question"], "answer": entry["answer"], "metadata": {}}
    return {"prompt": [SYSTEM, user, begun], "entry": kept, "task": task}
