"""The training worker: finds out what the group means need before every mini-batch, wherever its rows lie.

verl gives a loss one micro-batch of one rank. So before a mini-batch is trained on, its rows are scored once without
gradients, on every rank, and so are rows of the same groups that lie in other mini-batches; log-ratios cross the
network. The objective's slopes on whole groups are then known, and the loss of a micro-batch is their product with its
log-probs: the two passes of `gvpo.accumulate_gradients`. No pass is needed where log-ratios are 0 by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5

import torch
from tensordict import TensorDict
from torch import Tensor, distributed
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers import engine_workers
from verl.workers.utils.padding import no_padding_2_padding

from gvpo.integrations.verl.config import LOSS, NO_BETA, REFERENCES, GVPOPolicyLossConfig
from gvpo.objective import Rows, row_slopes

RECOMPUTED = "gvpo_recomputed"
"""Set by verl's v1 driver: whether the actor scored this batch (`old_log_probs`) with the weights it still has."""
_ROW, _SLOPE = "gvpo_row", "gvpo_slope"
_REWARDS = ("token_level_rewards", "rm_scores", "token_level_scores")


class _MicroBatch(NamedTuple):
    """slopes_N: d loss / d log-prob of its rows; loss: its share of the mini-batch's; ranks: that gradients are
    averaged over; metrics: of the mini-batch."""

    slopes_N: Tensor
    loss: float
    ranks: int
    metrics: dict[str, float]


_micro_batch: ContextVar[_MicroBatch | None] = ContextVar("gvpo_micro_batch", default=None)


@register_policy_loss(LOSS)
def policy_loss(*, log_prob: Tensor, response_mask: Tensor, **unused: Any) -> tuple[Tensor, dict[str, float]]:
    """verl's interface for a policy loss: log-probs and masks (N, T) of a micro-batch to a loss with GVPO's gradient.

    Its values add up to the mini-batch's loss. Advantages, loss_agg_mode and importance weights have no part in GVPO.
    Raises RuntimeError outside `GVPOTrainingWorker`.
    """
    now = _micro_batch.get()
    if now is None:
        raise RuntimeError(
            "loss_mode=gvpo needs whole groups, which only gvpo's training worker has: this trainer does not use "
            "verl.workers.engine_workers.ActorRolloutRefWorker.actor_worker_cls"
        )
    logps_N = torch.where(response_mask.bool(), log_prob, 0).sum(-1)
    surrogate = (now.slopes_N.to(logps_N) * logps_N).sum()
    loss = now.ranks * (surrogate - surrogate.detach() + now.loss)
    return loss, {f"gvpo/{name}": value for name, value in now.metrics.items()}


@dataclass(slots=True)
class _Batch:
    """What `train_mini_batch` was given. data: this rank's rows; rows: all ranks'. on_policy: log-ratios are still 0
    by construction."""

    data: TensorDict
    rows: Rows
    settings: GVPOPolicyLossConfig
    on_policy: bool


class GVPOTrainingWorker(engine_workers.ActorRolloutRefWorker.actor_worker_cls):
    """verl's training worker; with `policy_loss.loss_mode=gvpo` its losses are exact over whole groups."""

    _batch: _Batch | None = None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """As verl's, over mini-batches whose groups may lie in several of them."""
        self._batch = self._take(data)
        try:
            return super().train_mini_batch(data)
        finally:
            self._batch = None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """As verl's: one mini-batch, one optimizer step."""
        batch = self._batch or self._take(data)
        if batch is None:
            return super().train_batch(data)
        step = self.engine.train_batch
        self.engine.train_batch = partial(self._step, batch, step)
        try:
            return super().train_batch(data)
        finally:
            self.engine.train_batch = step

    def _take(self, data: TensorDict) -> _Batch | None:
        """Number this rank's rows, and learn about those of all ranks; None where the loss is not GVPO's."""
        settings = getattr(getattr(self.loss_fn, "keywords", {}).get("config"), "policy_loss", None)
        if getattr(settings, "loss_mode", None) != LOSS:
            return None
        if not isinstance(settings, GVPOPolicyLossConfig):
            raise ValueError(NO_BETA)
        rewards = next((data[name] for name in _REWARDS if name in data), None)
        if rewards is None or "uid" not in data:
            raise ValueError(
                f"loss_mode=gvpo needs uid and one of {', '.join(_REWARDS)}: this trainer does not send them"
            )
        self._warn_of_dropout()
        data[_ROW] = torch.arange(len(data), device=data["response_mask"].device)
        uids, sessions = data.get("uid").tolist(), self._places(data, len(data)).tolist()
        # Only v1 has sessions of several rows; else a row is a completion.
        if RECOMPUTED in data and "session_id" in data:
            sessions = data.get("session_id").tolist()
        scored = _padded(data["response_mask"]).any(-1)
        drawn = _padded(data["loss_mask"]).any(-1) if "loss_mask" in data else scored
        *columns, state = self._gather(
            _ids(uids),
            _ids(zip(uids, sessions, strict=True)),
            _padded(rewards).double().sum(-1),
            _scored_sum(_refs(data, settings), data),
            torch.where(scored, 1, torch.where(drawn, -1, 0)),
        )
        # A session of which verl rejected a row leaves its group: what is left of it is no completion.
        groups, members, rewards, refs = columns
        rows = Rows(groups, members, rewards, refs, (state > 0) & ~torch.isin(members, members[state < 0]))
        return _Batch(data, rows, settings, settings.gvpo_reference == "old" and tu.get(data, RECOMPUTED, False))

    def _step(self, batch: _Batch, inner: Any, data: TensorDict, loss_function: Any) -> Any:
        """The engine's step on a mini-batch, with a loss that knows the slopes of its rows."""
        here_N = torch.zeros(len(batch.rows.live_N), dtype=torch.bool)
        here_N[self._gather(self._places(data, len(batch.data)))[0]] = True
        slopes_N, metrics = row_slopes(batch.rows, here_N, self._ratios(batch, data, here_N), batch.settings.gvpo_beta)
        batch.on_policy = False
        data[_SLOPE] = slopes_N[self._places(data, len(batch.data))].to(data[_ROW].device)
        ranks, share = self.engine.get_data_parallel_size(), metrics["loss"] / int(here_N.sum())

        def exact_loss(*, data: TensorDict, **named: Any) -> Any:
            slopes = data[_SLOPE]
            token = _micro_batch.set(_MicroBatch(slopes, share * len(slopes), ranks, metrics))
            try:
                return loss_function(data=data, **named)
            finally:
                _micro_batch.reset(token)

        with self.engine.train_mode(disable_auto_offload=True):
            return inner(data, loss_function=exact_loss)

    def _places(self, data: TensorDict, count: int) -> Tensor:
        """Where among all ranks' rows these of this rank are; count: rows of a rank."""
        return data[_ROW].cpu() + self.engine.get_data_parallel_rank() * count

    def _ratios(self, batch: _Batch, data: TensorDict, here_N: Tensor) -> Tensor:
        """log pi/pi_ref of the rows that a mini-batch's groups have, float64, under the weights as they are."""
        ratios_N, count = torch.zeros(len(here_N), dtype=torch.float64), len(batch.data)
        if batch.on_policy:
            return ratios_N
        elsewhere_RN = (batch.rows.of_same_groups(here_N) & ~here_N).view(-1, count)
        parts = [data]
        if most := int(elsewhere_RN.sum(1).max()):
            missing = elsewhere_RN[self.engine.get_data_parallel_rank()].nonzero()[:, 0]
            parts = [self._select(batch.data, missing, most, data), data]
        for part in parts:  # its own rows last: the others are filled up with rows that may be among them
            places, ratios = self._gather(self._places(part, count), self._score(part, batch.settings))
            ratios_N[places] = ratios
        return ratios_N

    def _select(self, data: TensorDict, rows: Tensor, count: int, mini_batch: TensorDict) -> TensorDict:
        """These rows and others: on all ranks `count` or a few more, as many as can be dealt into micro-batches."""
        multiple = 1 if tu.get(mini_batch, "use_dynamic_bsz") else tu.get(mini_batch, "micro_batch_size_per_gpu")
        count = -(-count // multiple) * multiple
        selected = tu.index_select_tensor_dict(data, torch.cat([rows, rows.new_zeros(count - len(rows))]))
        for key in mini_batch.keys() - selected.keys():
            tu.assign_non_tensor_data(selected, key, tu.get(mini_batch, key))
        return selected

    def _score(self, data: TensorDict, settings: GVPOPolicyLossConfig) -> Tensor:
        """Log-ratio of every row, float64; 0 where this rank has no log-probs."""
        probe = data.exclude("uid", "session_id")  # whose copies, row by row, take longer than all else here
        tu.assign_non_tensor(probe, calculate_entropy=False, distillation_use_topk=False)
        with self.engine.eval_mode(disable_auto_offload=True):
            output = self.engine.infer_batch(probe).get("model_output", {})
        if "log_probs" not in output:  # no last stage of a pipeline: no loss is computed here
            return torch.zeros(len(data), dtype=torch.float64)
        logps_NT = no_padding_2_padding(output["log_probs"], data).double().cpu()
        return _scored_sum(logps_NT - _refs(data, settings).cpu(), data)

    def _gather(self, *columns: Tensor) -> list[Tensor]:
        """Columns of int64 or float64, one number per row of a rank, of all ranks in order; ranks have as many rows."""
        mine = torch.stack([one.cpu().view(torch.int64) for one in columns], 1).to(torch.device(get_device_name()))
        parts = [mine]
        if (ranks := self.engine.get_data_parallel_size()) > 1:
            parts = [torch.empty_like(mine) for _ in range(ranks)]
            distributed.all_gather(parts, mine, group=self.engine.get_data_parallel_group())
        gathered = torch.cat(parts).cpu().unbind(1)
        return [bits.contiguous().view(one.dtype) for bits, one in zip(gathered, columns, strict=True)]

    def _warn_of_dropout(self) -> None:
        config = getattr(self.model_config, "hf_config", None)
        for name, rate in ({} if config is None else config.to_dict()).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(rate, float) and rate > 0:
                warnings.warn(
                    f"gvpo: {name}={rate} in the model: gradients are approximate under dropout", stacklevel=2
                )


def _ids(names: Iterable[object]) -> Tensor:
    """63 bits a name, the same in every process."""
    return torch.tensor([uuid5(NAMESPACE_OID, str(name)).int >> 65 for name in names])


def _refs(data: TensorDict, settings: GVPOPolicyLossConfig) -> Tensor:
    """The reference's log-probs, (N, T) float64."""
    return _padded(data[REFERENCES[settings.gvpo_reference]]).double()


def _scored_sum(values_NT: Tensor, data: TensorDict) -> Tensor:
    """The sum over each row's scored tokens."""
    return torch.where(_padded(data["response_mask"]).bool().to(values_NT.device), values_NT, 0).sum(-1)


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values
