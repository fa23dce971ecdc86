"""The reference policy pi_theta': which weights the KL constraint is taken against, and scoring under them.

A snapshot keeps the trainable parameters only, and scores in the policy's place: the same module, dtype, wrapper and
batch plan score both, so equal weights give log-ratios of exactly zero. It costs one copy of the trainable parameters
in host memory, or none there and two on the disk; an adapter's snapshot is as small as the adapter. "rollout" costs
nothing: the policy is its own reference when the groups are drawn. Nor does "initial" where a LoRA adapter is all that
trains and adds nothing at the start: the model without its adapter is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gvpo.errors import UserError
from gvpo.groups import Completion, Group
from gvpo.models.adapters import adds_nothing, sole_lora_layers, without_adapter
from gvpo.models.encoding import encode_groups
from gvpo.models.loading import load_model
from gvpo.models.scoring import Scorer, plan_scoring, score_plan, scored_mask, unwrapped
from gvpo.training.processes import OneProcess
from gvpo.training.snapshot import Snapshot, Storage, lent, take_snapshot

PARAMETERS = "parameters.safetensors"
"""Where a checkpoint keeps the trainable parameters."""


class Reference:
    """pi_theta' of a run: "rollout", "initial", an integer n (renewed every n rollouts), the path of a model, or that
    of a run's checkpoint, whose trainable parameters are put in place of this model's.

    storage, folder: where a snapshot lives; folder None = the system's temporary one.
    Raises UserError for a path that cannot be loaded, or a checkpoint of another model.
    """

    def __init__(
        self, kind: str | int, scorer: nn.Module, *, storage: Storage = "cpu", folder: str | Path | None = None
    ) -> None:
        self.kind = kind
        self._scorer = scorer
        self._storage: Storage = storage
        self._folder = None if folder is None else Path(folder)
        self._snapshot: Snapshot | None = None
        self._other: Scorer | None = None
        self._switched_off = False
        if isinstance(kind, int) or kind in ("rollout", "initial"):
            return
        if is_checkpoint(kind):
            with _parameters(kind) as (names, file):
                self._check_shapes(kind, {name: tuple(file.get_slice(name).get_shape()) for name in names})
            return
        weight = next(scorer.parameters())
        model, _ = load_model(kind, dtype=weight.dtype, device=weight.device)
        self._other = Scorer(model.requires_grad_(False))

    def start(self) -> None:
        """Take the snapshot that the reference needs: of the policy as it is now, or of the checkpoint; once.

        Raises UserError if the disk is full.
        """
        if self._snapshot is not None or self._switched_off or not self._snapshots:
            return
        layers = sole_lora_layers(self._model) if self.kind == "initial" else []
        if layers and adds_nothing(layers):
            self._switched_off = True
            return
        self.renew()
        if isinstance(self.kind, str) and self.kind != "initial":
            with _parameters(self.kind) as (names, file):
                self._put((name, file.get_tensor(name)) for name in names)

    def renew(self) -> None:
        """Take the policy as it is now as the reference."""
        if self._snapshot is None:
            self._snapshot = take_snapshot(trainable(self._scorer), self._storage, self._folder)
        else:
            self._put(trainable(self._scorer))

    def before_rollout(self, rollout: int) -> None:
        """Renew where rollout number `rollout` (from 0) begins a new stretch of n."""
        if isinstance(self.kind, int) and rollout % self.kind == 0:
            self.renew()

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The scorer under pi_theta' inside the block; the policy's weights are back afterwards, whatever happens."""
        assert self._snapshot is not None or self._switched_off or not self._snapshots, "not started"
        place: AbstractContextManager[Any] = nullcontext()
        if self._switched_off:
            place = without_adapter(self._model)
        elif self._snapshot is not None:
            place = lent(self._snapshot, trainable(self._scorer))
        with place:
            yield self._other or self._scorer

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot, for a checkpoint; empty where there is none."""
        return {} if self._snapshot is None else self._snapshot.tensors()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's snapshot in place. Raises UserError if it is of another model.

        What the checkpoint's run found when it began counts, not the model that this run was given: where it had no
        snapshot of an "initial" reference, its adapter had added nothing.
        """
        if not state and self.kind == "initial" and sole_lora_layers(self._model):
            self._snapshot, self._switched_off = None, True
            return
        expected = _shapes(trainable(self._scorer)) if self._snapshots else {}
        if _shapes(state.items()) != expected:
            raise UserError("its reference is not of this kind and model; resume with the run's own config")
        if state:
            self._switched_off = False
            if self._snapshot is None:
                self.renew()
            self._put(state.items())

    @property
    def _snapshots(self) -> bool:
        return self.kind != "rollout" and self._other is None

    @property
    def _model(self) -> nn.Module:
        return unwrapped(self._scorer).model

    def _put(self, values: Iterable[tuple[str, Tensor]]) -> None:
        assert self._snapshot is not None
        for name, value in values:
            self._snapshot.put(name, value)

    def _check_shapes(self, path: str, theirs: dict[str, tuple[int, ...]]) -> None:
        ours = _shapes(trainable(self._scorer))
        if theirs == ours:
            return
        name = min(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        there, here = (held.get(name, "absent") for held in (theirs, ours))
        raise UserError(
            f"reference {path!r}: its trained parameters are not this model's: {name} is {there} there and {here} "
            "here; give a checkpoint of a run on the same model, trained in the same way"
        )


@torch.no_grad()
def score_groups(
    scorer: nn.Module,
    groups: Sequence[Group],
    *,
    token_budget: int | None,
    share_prefix: bool,
    processes: OneProcess,
    per_token: bool = False,
) -> Tensor:
    """log pi(y|x) of every member, nats, in order, on the CPU; never the sampler's own number.

    groups: with token ids, those of this process; the others call this too. per_token: token by token, (N, T).
    """
    encoded = encode_groups(groups, None)
    plan = plan_scoring(scorer, encoded, token_budget, share_prefix)
    width = scored_mask(encoded).shape[1] if per_token else None
    return score_plan(scorer, encoded, plan, processes.most(len(plan)), width=width).cpu()


def keep_reference(members: Sequence[Completion], logps: Tensor, *, but: Callable[[Completion], bool]) -> None:
    """Write log-probs under the reference, (N,) or (N, T), into these N members, `but` those that keep their own."""
    sums_N = logps if logps.dim() == 1 else logps.sum(1)
    for member, total, scores in zip(members, sums_N.tolist(), logps.tolist(), strict=True):
        if but(member):
            continue
        member.ref_logprob = total
        if logps.dim() == 2:
            member.ref_token_logprobs = scores[: len(member.token_ids or [])]


def keep_rollout(members: Sequence[Completion], logps_NT: Tensor) -> None:
    """Write log-probs under the policy that drew these N members into them; those that bring their own keep them."""
    for member, tokens in zip(members, logps_NT.tolist(), strict=True):
        if member.old_token_logprobs is None:
            member.old_token_logprobs = tokens[: len(member.token_ids or [])]


def trainable(scorer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of what is trained, in the module's order."""
    # Names without a data-parallel wrapper's prefix: a checkpoint does not depend on the number of processes.
    return ((name, p) for name, p in unwrapped(scorer).named_parameters() if p.requires_grad)


def is_checkpoint(path: str) -> bool:
    """Whether this is the folder of a run's checkpoint, whole or not, and no model's."""
    folder = Path(path)
    held = [(folder / name).is_file() for name in ("config.json", "state.json", PARAMETERS)]
    return not held[0] and any(held)


@contextmanager
def _parameters(checkpoint: str) -> Iterator[tuple[list[str], Any]]:
    """The names of a checkpoint's trainable parameters, and the open file that has them."""
    file = Path(checkpoint) / PARAMETERS
    try:
        with safe_open(file, "pt") as opened:
            yield list(opened.keys()), opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"reference {str(file)!r}: damaged or missing ({error}); name another checkpoint") from error


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors}
