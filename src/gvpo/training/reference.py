"""The reference policy pi_theta': which weights the KL constraint is taken against, and scoring under them.

A snapshot keeps the trainable parameters only, and scores by exchanging them, in place, with the policy's: the same
module, dtype, wrapper and batch plan score both, so equal weights give log-ratios of exactly zero. It costs one copy of
the trainable parameters; an adapter's snapshot is as small as the adapter. "rollout" costs nothing: the policy is its
own reference when the groups are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.models.encoding import encode_groups
from gvpo.models.loading import load_model
from gvpo.models.scoring import Scorer, member_order, plan_scoring
from gvpo.training.update import OneProcess, score_pass


class Reference:
    """pi_theta' of a run: "rollout", "initial", an integer n (renewed every n rollouts), or a model's path.

    Raises UserError for a path that cannot be loaded.
    """

    def __init__(self, kind: str | int, scorer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.kind = kind
        self._scorer = scorer
        self._snapshot: dict[str, Tensor] | None = None
        self._other: Scorer | None = None
        if kind == "initial" or isinstance(kind, int):
            self.renew()
        elif kind != "rollout":
            model, _ = load_model(kind, dtype=dtype, device=device)
            self._other = Scorer(model.requires_grad_(False))

    def renew(self) -> None:
        """Take the policy as it is now as the reference."""
        self._snapshot = {name: p.detach().clone() for name, p in _trainable(self._scorer)}

    def before_rollout(self, rollout: int) -> None:
        """Renew where rollout number `rollout` (from 0) begins a new stretch of n."""
        if isinstance(self.kind, int) and rollout % self.kind == 0:
            self.renew()

    @torch.no_grad()
    def logprobs(
        self,
        groups: Sequence[Group],
        tokenizer: Any | None,
        token_budget: int | None,
        share_prefix: bool,
        processes: OneProcess,
    ) -> Tensor:
        """log pi_theta'(y|x) of every member, nats, in order; never the sampler's own number."""
        scorer = self._other or self._scorer
        encoded = encode_groups(groups, tokenizer)
        plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
        order = member_order(encoded, plan)
        with self._in_place():
            pieces = [
                score_pass(scorer, encoded, plan[turn] if turn < len(plan) else None)
                for turn in range(processes.most(len(plan)))
            ][: len(plan)]
        if not pieces:
            return torch.zeros(0)
        logps_N = torch.cat(pieces).cpu()
        return torch.zeros_like(logps_N).index_copy(0, order, logps_N)

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot, for a checkpoint; empty where there is none."""
        return dict(self._snapshot or {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's snapshot in place. Raises UserError if it is of another model."""
        snapshot = self._snapshot or {}
        if {name: value.shape for name, value in state.items()} != {n: value.shape for n, value in snapshot.items()}:
            raise UserError(
                "the checkpoint's reference is not of this kind and model; resume with the run's own config"
            )
        for name, value in snapshot.items():
            value.copy_(state[name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        with nullcontext() if self._snapshot is None else _exchanged(self._scorer, self._snapshot):
            yield


@contextmanager
def _exchanged(scorer: nn.Module, snapshot: dict[str, Tensor]) -> Iterator[None]:
    _exchange(scorer, snapshot)
    try:
        yield
    finally:
        _exchange(scorer, snapshot)


@torch.no_grad()
def _exchange(scorer: nn.Module, snapshot: dict[str, Tensor]) -> None:
    for name, parameter in _trainable(scorer):
        held = parameter.detach().clone()
        parameter.copy_(snapshot[name])
        snapshot[name].copy_(held)


def _trainable(scorer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # Names without a data-parallel wrapper's prefix: a checkpoint does not depend on the number of processes.
    inner = getattr(scorer, "module", scorer)
    return ((name, parameter) for name, parameter in inner.named_parameters() if parameter.requires_grad)
