#!/usr/bin/env bash
# The paper's main setting: Qwen2.5-Math-7B trained on MATH. Data: python recipes/verl/prepare_data.py --math data
#
# The paper (arXiv 2504.19599) states the model, the data and that beta hardly matters in [0.01, 0.5]; k, batch, rate,
# lengths and epochs are not in it: those of the authors' script (README there: "may differ from the paper"). Rewards
# are verl's rules for MATH; the paper's verifier is xVerify.
#
# Estimate, docs/scale.md, completions of 600 tokens on average:
#   8 x H100 80 GB: 33 GB a GPU in updates, 62 GB in rollouts; 111 s a step; 105 steps, 3.3 h
#   8 x A100 80 GB: the same memory; 235 s a step; 6.9 h
#
#   recipes/verl/qwen2.5-math-7b-math.sh --dry-run
options=(
    # GVPO: these three turn verl's GRPO into it
    actor_rollout_ref.actor.policy_loss.loss_mode=gvpo
    actor_rollout_ref.actor.policy_loss._target_=gvpo.integrations.verl.GVPOPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.gvpo_beta=0.1  # script; paper: any in [0.01, 0.5]
    algorithm.adv_estimator=grpo  # no critic; advantages are logged, not used

    actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B  # paper
    data.train_files="'${DATA:-data}/math/train.parquet'"  # paper: Competition Math
    data.val_files="'${DATA:-data}/math/test.parquet'"
    data.max_prompt_length=1024  # script
    data.max_response_length=1024  # script
    data.filter_overlong_prompts=True  # script
    data.seed=1  # script: verl 0.6.0's own

    data.train_batch_size=1024  # script: prompts of a rollout
    actor_rollout_ref.actor.ppo_mini_batch_size=256  # script: prompts of an update; 4 updates a rollout
    actor_rollout_ref.rollout.n=4  # script: k
    trainer.total_epochs=15  # script
    actor_rollout_ref.actor.optim.lr=1e-6  # script: AdamW, constant, weight decay 0.01
    actor_rollout_ref.actor.optim.clip_grad=1.0  # ours; as in the script it would be 0.25 (docs/verl-migration.md, section 3)

    # Ours: where time and memory go, without a say in what is learned
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=2  # script
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6  # script
    trainer.n_gpus_per_node=8
    trainer.nnodes=1

    trainer.project_name=gvpo
    trainer.experiment_name=qwen2.5-math-7b-math
    trainer.logger='[console]'
    trainer.save_freq=20  # script
    trainer.test_freq=20  # script
)
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
