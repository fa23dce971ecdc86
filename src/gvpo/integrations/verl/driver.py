"""What happens on the driver: options that cannot be exact are refused, and rows ordered so that groups stay whole."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf

from gvpo.errors import UserError
from gvpo.integrations.order import group_order
from gvpo.integrations.verl.config import LOSS, NO_BETA
from gvpo.integrations.verl.worker import RECOMPUTED

_ACTOR, _CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"
_BYPASS, _REJECTION, _WEIGHTS = (f"{_CORRECTION}.{name}" for name in ("bypass_mode", "rollout_rs", "rollout_is"))
REFUSED = {
    f"{_ACTOR}.megatron.dynamic_context_parallel": (
        True,
        "rows are dealt out anew for every micro-batch, and no rank knows a group; set it to False",
    ),
    f"{_ACTOR}.veomni.router_replay.mode": (
        "R2",
        "a pass that scores would be routed otherwise than the update; set it to disabled",
    ),
    "skip.rollout_tq.enable": (True, "a completion that is repeated would pass for a part of itself; set it to False"),
}
"""By option, the value that cannot be exact, and why."""

_log = logging.getLogger(__name__)


def install() -> None:
    """Wrap verl's trainers; those without GVPO in their configuration are left as they are."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync

    _wrap(RayPPOTrainer, "__init__", functools.partial(_start, True))
    scores = (PPOTrainer._compute_old_log_prob, PPOTrainerSeparateAsync._compute_old_log_prob)
    _wrap(PPOTrainer, "__init__", functools.partial(_start, False))
    _wrap(PPOTrainer, "_balance_batch", _balance)
    _wrap(PPOTrainer, "_update_actor", functools.partial(_update, scores))


def check_options(config: Any, legacy: bool = False) -> None:
    """Refuse what cannot be exact, and warn of what is approximate or without effect. legacy: verl's v0 trainer.

    Raises UserError naming the option.
    """
    get = functools.partial(OmegaConf.select, config)
    actor, bypass, rejects = get(_ACTOR), get(_BYPASS), str(get(_REJECTION))
    if "GVPOPolicyLossConfig" not in str(actor.policy_loss.get("_target_")):
        raise UserError(NO_BETA)
    if (k := get("actor_rollout_ref.rollout.n")) < 2:
        raise UserError(f"actor_rollout_ref.rollout.n={k}: a group of one teaches nothing; draw 2 and more")
    for option, (value, why) in REFUSED.items():
        if get(option) == value:
            raise UserError(f"{option}={value}: {why}")
    if legacy and bypass:
        raise UserError(f"{_BYPASS}=True and trainer.use_v1=False: verl changes loss_mode; set trainer.use_v1=True")
    if "token" in rejects and not bypass:
        raise UserError(
            f"{_REJECTION}={rejects} takes single tokens out of a completion, and what is left has not the policy's "
            "log-prob: use a mode of whole sequences (seq_...)"
        )
    if actor.policy_loss.get("gvpo_reference") == "ref" and not (
        actor.use_kl_loss or get("algorithm.use_kl_in_reward")
    ):
        raise UserError(
            f"{_ACTOR}.policy_loss.gvpo_reference=ref needs the reference's log-probs: set {_ACTOR}.use_kl_loss=True "
            "(and kl_loss_coef=0 to keep verl's own KL term out)"
        )
    if get(_WEIGHTS):
        _log.warning(f"gvpo: importance weights ({_WEIGHTS}) have no part in GVPO: ignored")
    if actor.get("shuffle"):
        _log.warning("gvpo: actor.shuffle=True tears groups apart; exact, but rows are scored several times")
    if get("actor_rollout_ref.rollout.temperature") != 1:
        _log.warning("gvpo: rollout.temperature is not 1: verl takes log-probs, and trains the policy, at it")


def uses_gvpo(config: Any) -> bool:
    return OmegaConf.select(config, f"{_ACTOR}.policy_loss.loss_mode") == LOSS


def _wrap(trainer: type, name: str, around: Callable[..., Any]) -> None:
    inner = getattr(trainer, name)

    @functools.wraps(inner)
    def method(*args: Any, **named: Any) -> Any:
        return around(inner, *args, **named)

    setattr(trainer, name, method)


def _start(legacy: bool, inner: Any, trainer: Any, config: Any, *args: Any, **named: Any) -> None:
    if uses_gvpo(config):
        check_options(config, legacy)
    inner(trainer, config, *args, **named)


def _balance(inner: Any, trainer: Any, batch: Any, *args: Any, **named: Any) -> Any:
    """Order rows so that mini-batches hold whole groups, and ranks have equally much to do in each."""
    batch, settings = inner(trainer, batch, *args, **named), trainer.config.actor_rollout_ref
    size = settings.actor.ppo_mini_batch_size * settings.rollout.n
    if not uses_gvpo(trainer.config) or len(batch) % size:  # a warm-up of the critic does not train the actor
        return batch
    from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

    # Padding is put where there is room, row by row.
    rows = zip(batch.keys, batch.tags, strict=True)
    groups = [key if tag.get("is_padding") else key.rsplit("_", 2)[0] for key, tag in rows]
    loads = calculate_workload(torch.tensor([tag["seq_len"] for tag in batch.tags], dtype=torch.int64)).tolist()
    ranks = max(trainer.actor_rollout_wg._dispatch_info["actor"]) + 1
    partition = functools.partial(get_seqlen_balanced_partitions, equal_size=True)
    batch.reorder(group_order(groups, loads, len(batch) // size, ranks, partition))
    return batch


def _update(scores: tuple[Any, Any], inner: Any, trainer: Any, batch: Any, metrics: dict[str, Any]) -> Any:
    """Say whether log-ratios are 0, and give metrics their names. scores: verl's own ways to score a batch."""
    if not uses_gvpo(trainer.config):
        return inner(trainer, batch, metrics)
    own = type(trainer)._compute_old_log_prob
    # Between its updates the separate trainer scores with weights of before.
    current = own is scores[0] or (own is scores[1] and trainer.local_trigger_step == 0)
    batch.extra_info[RECOMPUTED] = current and not OmegaConf.select(trainer.config, _BYPASS)
    batch = inner(trainer, batch, metrics)
    for name in [name for name in metrics if name.startswith("actor/gvpo/")]:
        metrics[name.removeprefix("actor/")] = metrics.pop(name)
    return batch
