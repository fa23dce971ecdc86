"""groups -> reference log-probs: scored, or taken from data whose numbers the user says to trust."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.training.processes import OneProcess
from gvpo.training.reference import Reference, keep_reference, keep_rollout


class Batch(Protocol):
    """One update's groups, of rewarded members alone, and the groups' numbers in the run."""

    @property
    def groups(self) -> list[Group]: ...

    @property
    def numbers(self) -> list[int]: ...


@dataclass
class Trust:
    """Whether members keep the ref_logprob that they bring; with per_token their ref_token_logprobs are needed too.

    limit: how many nats a token that number may differ from a score. checked: whether a batch that need not be scored
    has been, to compare.
    """

    allowed: bool
    per_token: bool
    limit: float
    processes: OneProcess
    checked: bool = False

    def brings(self, member: Completion) -> bool:
        """Whether this member's own number is to be used."""
        tokens = member.ref_token_logprobs is not None or not self.per_token
        return self.allowed and member.ref_logprob is not None and tokens

    def to_score(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of which some members bring nothing, and the first of the others ever: the same on all processes.

        Scoring meets other processes, so whether to score is decided by all of them together.
        """
        if not self.allowed:
            return list(batches)
        chosen: list[Batch] = []
        for batch in batches:
            members = completions_of(batch.groups)
            count = self.processes.total(len(members))
            trusted = self.processes.total(sum(map(self.brings, members)))
            if trusted < count or (count and not self.checked):
                chosen.append(batch)
            self.checked |= trusted == count > 0
        return chosen

    def check(self, batch: Batch, logps: Tensor) -> None:
        """Compare what the members bring with their scores. Raises UserError, on every process, where they differ."""
        if not self.allowed:
            return
        groups = zip(batch.numbers, batch.groups, strict=True)
        members = [(number, group, member) for number, group in groups for member in group.completions]
        problems = [
            f"group {group.id or number} of the run (prompt {_prompt(group)}), completion {_text(member)}: {problem}"
            for (number, group, member), score in zip(members, logps.tolist(), strict=True)
            if (problem := self._problem(member, score))
        ]
        if first := self.processes.interleave(problems[:1]):
            raise UserError(
                f"{first[0]}; set trust_ref_logprobs to false to have it recomputed, or give numbers that were made "
                "under this run's reference"
            )

    def _problem(self, member: Completion, score: float | list[float]) -> str | None:
        if not self.brings(member):
            return None
        assert member.ref_logprob is not None and member.token_ids is not None
        compared: list[tuple[str, float, float, int]] = []
        if isinstance(score, list):
            pairs = zip(member.ref_token_logprobs or [], score, strict=False)
            compared = [(f"ref_token_logprobs[{n}]", one, other, 1) for n, (one, other) in enumerate(pairs)]
            score = sum(score)
        compared.append(("ref_logprob", member.ref_logprob, score, _scored_tokens(member)))
        for name, given, own, tokens in compared:
            # Written so that NaN differs.
            if not (apart := abs(given - own) / tokens) <= self.limit:
                return (
                    f"its {name} is {given:.6g}, but the reference gives {own:.6g}, {apart:.2g} nats a token apart "
                    f"(limit {self.limit:g})"
                )
        return None


def refer(
    batches: Sequence[Batch],
    reference: Reference,
    score: Callable[[nn.Module, list[Group]], Tensor],
    trust: Trust,
    policy: nn.Module | None,
) -> None:
    """Write the reference log-prob of every member of these batches, those of one rollout, into it.

    score: the log-probs of groups under a scorer, (N,) or (N, T), in the way that the update scores them.
    policy: where log-probs under the policy that drew the groups, the one of now, are to be written as well.
    """
    scored = trust.to_score(batches)
    if scored:
        with reference.weights() as scorer:
            for batch in scored:
                logps = score(scorer, batch.groups)
                trust.check(batch, logps)
                keep_reference(completions_of(batch.groups), logps, but=trust.brings)
                if policy is not None and reference.kind == "rollout":
                    keep_rollout(completions_of(batch.groups), logps)
    if policy is not None and reference.kind != "rollout":
        for batch in batches:
            keep_rollout(completions_of(batch.groups), score(policy, batch.groups))


def completions_of(groups: Sequence[Group]) -> list[Completion]:
    """All completions, end to end."""
    return [completion for group in groups for completion in group.completions]


def _prompt(group: Group) -> str:
    return reprlib.repr(group.prompt_ids if group.prompt is None else group.prompt)


def _text(member: Completion) -> str:
    return reprlib.repr(member.token_ids if member.text is None else member.text)


def _scored_tokens(member: Completion) -> int:
    mask = [True] * len(member.token_ids or []) if member.loss_mask is None else member.loss_mask
    return max(1, sum(mask))
