"""Policies over finitely many answers, with exact log-probs, closed-form optima and distances; float64 throughout.

Shapes: A answers, E entries of a table's logits. Log-probs are in nats.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """A policy's form: one row of `vocabulary` logits for each prefix, laid end to end."""

    answers: tuple[tuple[int, ...], ...]
    steps_AE: Tensor  # 1 where an answer draws that token after that prefix
    vocabulary: int

    @property
    def entries(self) -> int:
        """How many logits there are."""
        return self.steps_AE.shape[1]

    def logps(self, logits_E: Tensor) -> Tensor:
        """log pi(y) of every answer: the sum over its tokens, the end token included."""
        tokens_E = logits_E.view(-1, self.vocabulary).log_softmax(-1).flatten()
        return self.steps_AE @ tokens_E


def autoregressive_table(vocabulary: int, longest: int) -> Table:
    """Every sequence of at most `longest` tokens; the last token of the vocabulary ends it, or the limit cuts it off.

    Any law with full support over these answers is such a table, for exactly one choice of token probabilities.
    """
    words, end = range(vocabulary - 1), vocabulary - 1
    prefixes = [prefix for length in range(longest) for prefix in itertools.product(words, repeat=length)]
    cut_off = itertools.product(words, repeat=longest)
    answers = sorted([*((*prefix, end) for prefix in prefixes), *cut_off])
    row = {prefix: number for number, prefix in enumerate(prefixes)}
    steps_AE = torch.zeros(len(answers), len(prefixes) * vocabulary, dtype=torch.float64)
    for number, answer in enumerate(answers):
        for place, token in enumerate(answer):
            steps_AE[number, row[answer[:place]] * vocabulary + token] = 1.0
    return Table(tuple(answers), steps_AE, vocabulary)


def softmax_table(answers: int) -> Table:
    """One logit for each answer: sequences of one token."""
    return autoregressive_table(answers, 1)


@dataclass(frozen=True)
class Problem:
    """What one prompt asks: a reference, a reward for every answer, and the strength of the pull to the reference."""

    reference_A: Tensor  # log-probs
    rewards_A: Tensor
    beta: float

    def optimum(self) -> Tensor:
        """log pi*, pi* = pi_ref exp(R / beta) / Z: the maximiser of E[R] - beta KL(pi || pi_ref)."""
        return (self.reference_A + self.rewards_A / self.beta).log_softmax(0)


def random_problem(table: Table, *, seed: int, beta: float) -> Problem:
    """A reference with standard normal logits, and rewards uniform in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    reference_A = table.logps(torch.randn(table.entries, generator=generator, dtype=torch.float64))
    return Problem(reference_A, torch.rand(len(table.answers), generator=generator, dtype=torch.float64), beta)


def random_logits(table: Table, *, seed: int, scale: float) -> Tensor:
    """Normal logits: where a descent starts."""
    return scale * torch.randn(table.entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total_variation(logp_A: Tensor, other_A: Tensor) -> float:
    """Half the sum of absolute differences of the probabilities; in [0, 1]."""
    return float((logp_A.exp() - other_A.exp()).abs().sum() / 2)


def kl(logp_A: Tensor, other_A: Tensor) -> float:
    """KL(pi || other), in nats."""
    return float((logp_A.exp() * (logp_A - other_A)).sum())


def entropy(logp_A: Tensor) -> float:
    """Entropy, in nats."""
    return float(-(logp_A.exp() * logp_A).sum())


def mean(probs_A: Tensor, values_A: Tensor) -> float:
    """Expectation of a value of the answer."""
    return float(probs_A @ values_A)


def variance(probs_A: Tensor, values_A: Tensor) -> float:
    """Variance of a value of the answer."""
    return float(probs_A @ (values_A - probs_A @ values_A) ** 2)


def spread(values_A: Tensor) -> float:
    """Largest less smallest."""
    return float(values_A.max() - values_A.min())
