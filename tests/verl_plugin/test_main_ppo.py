"""Whole runs of `python -m verl.trainer.main_ppo`, with Ray, on two ranks of this CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from verl_run import steps_of

OPTIONS = [
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=4",
    "data.max_prompt_length=16",
    "data.max_response_length=8",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gvpo",
    "actor_rollout_ref.actor.policy_loss._target_=gvpo.integrations.verl.GVPOPolicyLossConfig",
    "+actor_rollout_ref.actor.policy_loss.gvpo_beta=0.1",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    'trainer.logger=["console"]',
    "trainer.nnodes=1",
    "trainer.val_before_train=False",
    "trainer.test_freq=-1",
]


def run(environment, folder, data, out, ranks, *options) -> list[dict[str, float]]:
    """One run. Returns the metrics of its steps."""
    own = [
        f"data.train_files={data}",
        f"data.val_files={data}",
        f"actor_rollout_ref.model.path={folder}",
        f"reward.custom_reward_function.path={Path(__file__).parent / 'toy_reward.py'}",
        f"trainer.default_local_dir={out}",
        f"trainer.n_gpus_per_node={ranks}",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
    ]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *OPTIONS, *own, *options]
    return steps_of(command, environment, out.parent)


def test_two_ranks_keep_groups_whole_and_go_on_from_a_checkpoint(environment, folder, data, tmp_path):
    """Digits are rewarded: the rewards' variance, and the loss with it, goes. The resumed run is anchored to the
    initial model, from which the policy is nats away."""
    out = tmp_path / "run"
    options = [
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "trainer.total_epochs=4",
        "trainer.save_freq=12",
    ]
    first = run(environment, folder, data, out, 2, *options, "trainer.total_training_steps=12")
    assert [step["training/global_step"] for step in first] == [*range(1, 13)]
    for step in first:
        assert step["gvpo/split_groups"] == 0
        assert step["gvpo/members_per_group"] == 4
    # A completion that ends at once and earns nothing makes one late step's loss large: medians.
    assert middle(first[-5:], "gvpo/loss") < middle(first[:5], "gvpo/loss") / 2
    (saved,) = out.glob("global_step_12/actor/huggingface/*.safetensors")
    before, after = load_file(folder / "model.safetensors"), load_file(saved)
    assert all(not torch.equal(before[name], after[name]) for name in before)

    anchored = [
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=0",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        "+actor_rollout_ref.actor.policy_loss.gvpo_reference=ref",
    ]
    (more,) = run(environment, folder, data, out, 2, *options, *anchored, "trainer.total_training_steps=13")
    assert more["training/global_step"] == 13
    assert more["gvpo/reward"] > mean(first[:3], "gvpo/reward") + 0.2
    assert more["gvpo/log_ratio/max"] > 5 > middle(first, "gvpo/log_ratio/max") > 0


def test_the_reward_rises(environment, folder, data, tmp_path):
    """Rollout log-probs are the reference, micro-batches are dynamic, and a mini-batch is the whole rollout."""
    options = [
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=60",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=60",
        "algorithm.rollout_correction.bypass_mode=True",
        "trainer.total_training_steps=16",
        "trainer.total_epochs=4",
    ]
    steps = run(environment, folder, data, tmp_path / "run", 1, *options)
    assert mean(steps[-3:], "gvpo/reward") > mean(steps[:3], "gvpo/reward") + 0.4


def test_the_older_trainer_tears_groups_and_is_exact_all_the_same(environment, folder, data, tmp_path):
    """It keeps verl's order of rows, so that mini-batches hold parts of groups; metrics keep its prefix."""
    options = [
        "trainer.use_v1=False",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "trainer.total_training_steps=2",
    ]
    steps = run(environment, folder, data, tmp_path / "run", 2, *options)
    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["actor/gvpo/members_per_group"] == 4
        assert step["actor/gvpo/groups"] == 4
        assert step["actor/gvpo/split_groups"] > 0


def middle(steps: list[dict[str, float]], name: str) -> float:
    return median(step[name] for step in steps)


def mean(steps: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)
