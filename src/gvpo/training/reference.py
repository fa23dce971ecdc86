"""The reference policy pi_theta': which weights the KL constraint is taken against, and scoring under them.

A snapshot keeps the trainable parameters only, and scores by exchanging them, in place, with the policy's: the same
module, dtype, wrapper and batch plan score both, so equal weights give log-ratios of exactly zero. It costs one copy of
the trainable parameters; an adapter's snapshot is as small as the adapter. "rollout" costs nothing: the policy is its
own reference when the groups are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.encoding import encode_groups
from gvpo.models.loading import load_model
from gvpo.models.scoring import Scorer, plan_scoring, score_plan, scored_mask, unwrapped
from gvpo.training.processes import OneProcess


class Reference:
    """pi_theta' of a run: "rollout", "initial", an integer n (renewed every n rollouts), or a model's path.

    Raises UserError for a path that cannot be loaded.
    """

    def __init__(self, kind: str | int, scorer: nn.Module) -> None:
        self.kind = kind
        self._scorer = scorer
        self._snapshot: dict[str, Tensor] | None = None
        self._other: Scorer | None = None
        if kind == "initial" or isinstance(kind, int):
            self.renew()
        elif kind != "rollout":
            weight = next(scorer.parameters())
            model, _ = load_model(kind, dtype=weight.dtype, device=weight.device)
            self._other = Scorer(model.requires_grad_(False))

    def renew(self) -> None:
        """Take the policy as it is now as the reference."""
        self._snapshot = {name: p.detach().clone() for name, p in trainable(self._scorer)}

    def before_rollout(self, rollout: int) -> None:
        """Renew where rollout number `rollout` (from 0) begins a new stretch of n."""
        if isinstance(self.kind, int) and rollout % self.kind == 0:
            self.renew()

    @torch.no_grad()
    def logprobs(
        self,
        groups: Sequence[Group],
        token_budget: int | None,
        share_prefix: bool,
        processes: OneProcess,
        *,
        per_token: bool = False,
    ) -> Tensor:
        """log pi_theta'(y|x) of every member, nats, in order, on the CPU; never the sampler's own number.

        groups: with token ids, those of this process; the others call this too. per_token: token by token, (N, T).
        """
        scorer = self._other or self._scorer
        encoded = encode_groups(groups, None)
        plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
        with nullcontext() if self._snapshot is None else _exchanged(self._scorer, self._snapshot):
            width = scored_mask(encoded).shape[1] if per_token else None
            return score_plan(scorer, encoded, plan, processes.most(len(plan)), width=width).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot, for a checkpoint; empty where there is none."""
        return dict(self._snapshot or {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's snapshot in place. Raises UserError if it is of another model."""
        snapshot = self._snapshot or {}
        if {name: value.shape for name, value in state.items()} != {n: value.shape for n, value in snapshot.items()}:
            raise UserError("its reference is not of this kind and model; resume with the run's own config")
        for name, value in snapshot.items():
            value.copy_(state[name])


def keep_reference(members: Sequence[Completion], logps: Tensor) -> None:
    """Write log-probs under the reference, (N,) or (N, T), into these N members."""
    sums_N = logps if logps.dim() == 1 else logps.sum(1)
    for member, total in zip(members, sums_N.tolist(), strict=True):
        member.ref_logprob = total
    if logps.dim() == 2:
        for member, tokens in zip(members, logps.tolist(), strict=True):
            member.ref_token_logprobs = tokens[: len(member.token_ids or [])]


def keep_rollout(members: Sequence[Completion], logps_NT: Tensor) -> None:
    """Write log-probs under the policy that drew these N members into them; those that bring their own keep them."""
    for member, tokens in zip(members, logps_NT.tolist(), strict=True):
        if member.old_token_logprobs is None:
            member.old_token_logprobs = tokens[: len(member.token_ids or [])]


@contextmanager
def _exchanged(scorer: nn.Module, snapshot: dict[str, Tensor]) -> Iterator[None]:
    _exchange(scorer, snapshot)
    try:
        yield
    finally:
        _exchange(scorer, snapshot)


@torch.no_grad()
def _exchange(scorer: nn.Module, snapshot: dict[str, Tensor]) -> None:
    for name, parameter in trainable(scorer):
        held = parameter.detach().clone()
        parameter.copy_(snapshot[name])
        snapshot[name].copy_(held)


def trainable(scorer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of what is trained, in the module's order."""
    # Names without a data-parallel wrapper's prefix: a checkpoint does not depend on the number of processes.
    return ((name, p) for name, p in unwrapped(scorer).named_parameters() if p.requires_grad)
