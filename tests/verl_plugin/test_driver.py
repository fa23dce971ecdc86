"""What the plug-in does beside the gradient, by stand-ins for verl's trainers, batches and workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import verl  # noqa: F401
from omegaconf import OmegaConf
from transformers import LlamaConfig
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from gvpo.integrations.verl import driver
from gvpo.integrations.verl.worker import RECOMPUTED, GVPOTrainingWorker, policy_loss

SCORES = (PPOTrainer._compute_old_log_prob, PPOTrainerSeparateAsync._compute_old_log_prob)


def make_trainer(kind: type, *, loss_mode="gvpo", bypass=False, step=0):
    """A trainer of this class that only has what the plug-in looks at: mini-batches of 2 prompts, 4 rows each."""
    config = {
        "actor_rollout_ref": {
            "actor": {"policy_loss": {"loss_mode": loss_mode}, "ppo_mini_batch_size": 2},
            "rollout": {"n": 4},
        },
        "algorithm": {"rollout_correction": {"bypass_mode": bypass}},
    }
    trainer = kind.__new__(kind)
    trainer.config, trainer.local_trigger_step = OmegaConf.create(config), step
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})
    return trainer


class OwnScores(PPOTrainerSync):
    def _compute_old_log_prob(self, batch, metrics):
        """Somebody's own."""


@pytest.mark.parametrize(
    ("kind", "settings", "zero"),
    [
        (PPOTrainerSync, {}, True),
        (PPOTrainerSync, {"bypass": True}, False),
        (PPOTrainerSeparateAsync, {"step": 0}, True),
        (PPOTrainerSeparateAsync, {"step": 1}, False),
        (PPOTrainerSeparateAsync, {"step": 0, "bypass": True}, False),
        (OwnScores, {}, False),
    ],
)
def test_log_ratios_are_zero_only_where_the_actor_scored_with_the_weights_it_has(kind, settings, zero):
    batch, metrics = SimpleNamespace(extra_info={}), {}

    def update(trainer, batch, metrics):
        metrics |= {"actor/gvpo/loss": 1.0, "actor/pg_loss": 2.0}
        return batch

    driver._update(SCORES, update, make_trainer(kind, **settings), batch, metrics)
    assert batch.extra_info[RECOMPUTED] is zero
    assert metrics == {"gvpo/loss": 1.0, "actor/pg_loss": 2.0}


class Batch(SimpleNamespace):
    """As verl's: keys uid_session_index, tags, and an order."""

    def __len__(self):
        return len(self.keys)

    def reorder(self, order):
        self.keys, self.tags = [self.keys[place] for place in order], [self.tags[place] for place in order]


def make_batch(groups=4, size=4, padding=0):
    """Rows in the order of completion; a uid may hold what keys are joined by."""
    keys = [f"a_b{group}_{member}_0" for member in range(size) for group in range(groups)]
    tags = [{"seq_len": 10 + 7 * place % 50} for place in range(len(keys))]
    keys += [f"pad{number}_0_0" for number in range(padding)]
    return Batch(keys=keys, tags=tags + [{"seq_len": 1, "is_padding": True}] * padding)


def balance(trainer, batch):
    return driver._balance(lambda trainer, batch, metrics: batch, trainer, batch, {})


@pytest.mark.parametrize(("groups", "padding"), [(4, 0), (3, 4)])
def test_mini_batches_hold_whole_groups_in_equal_parts_of_the_ranks(groups, padding):
    """16 rows are two mini-batches of 8, each 4 rows of rank 0 and 4 of rank 1."""
    before = make_batch(groups, padding=padding)
    rows = sorted(before.keys)
    batch = balance(make_trainer(PPOTrainerSync), before)
    assert sorted(batch.keys) == rows
    for first in (0, 4):
        held = [key.rsplit("_", 2)[0] for start in (first, 8 + first) for key in batch.keys[start : start + 4]]
        assert all(held.count(group) in (0, 4) for group in {f"a_b{number}" for number in range(groups)})


def test_other_losses_and_warm_ups_of_a_critic_keep_verls_order():
    order = make_batch().keys
    assert balance(make_trainer(PPOTrainerSync, loss_mode="vanilla"), make_batch()).keys == order
    odd = make_batch(groups=3)  # 12 rows are no whole number of mini-batches
    assert balance(make_trainer(PPOTrainerSync), odd).keys == make_batch(groups=3).keys


def test_other_losses_are_not_touched():
    batch = SimpleNamespace(extra_info={})
    driver._update(SCORES, lambda *args: None, make_trainer(PPOTrainerSync, loss_mode="vanilla"), batch, {})
    assert batch.extra_info == {}


def test_dropout_is_warned_of():
    worker = SimpleNamespace(model_config=SimpleNamespace(hf_config=LlamaConfig(attention_dropout=0.1)))
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1 in the model"):
        GVPOTrainingWorker._warn_of_dropout(worker)


def test_the_loss_refuses_workers_that_do_not_know_groups():
    """Never a mean over what one micro-batch happens to hold."""
    with pytest.raises(RuntimeError, match="only gvpo's training worker has"):
        policy_loss(old_log_prob=None, log_prob=torch.zeros(2, 3), response_mask=torch.ones(2, 3))
