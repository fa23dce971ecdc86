#!/usr/bin/env bash
# The authors' script (verl-recipe, gvpo/run_qwen2-7b_math_gvpo.sh) on current verl, number by number: Qwen2.5-Math-7B on
# GSM8K and MATH. Data: python recipes/verl/prepare_data.py --gsm8k --math data
#
# Its gradient is micro-batch / k = 4 times the mean over groups, this one the mean: clipping norm and AdamW's epsilon
# are a quarter here, so that the updates are the same (docs/verl-migration.md, section 3).
#
# Estimate, docs/scale.md, completions of 400 tokens on average:
#   2 x H100 80 GB: needs both offloads (74 GB a GPU in updates, 97 GB in rollouts without); 310 s a step; 210 steps,
#   18.1 h. The script has them off: on GPUs of 141 GB add ...param_offload=False ...optimizer_offload=False
#   2 x A100 80 GB: the same memory; 656 s a step; 38.3 h
#
#   recipes/verl/qwen2.5-math-7b-gsm8k-math.sh --dry-run
options=(
    # GVPO: these three turn verl's GRPO into it
    actor_rollout_ref.actor.policy_loss.loss_mode=gvpo
    actor_rollout_ref.actor.policy_loss._target_=gvpo.integrations.verl.GVPOPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.gvpo_beta=0.1
    algorithm.adv_estimator=grpo  # no critic; advantages are logged, not used

    actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B
    data.train_files="['${DATA:-data}/gsm8k/train.parquet','${DATA:-data}/math/train.parquet']"
    data.val_files="['${DATA:-data}/gsm8k/test.parquet','${DATA:-data}/math/test.parquet']"
    data.max_prompt_length=1024
    data.max_response_length=1024
    data.filter_overlong_prompts=True
    data.seed=1  # verl 0.6.0's own

    data.train_batch_size=1024  # prompts of a rollout
    actor_rollout_ref.actor.ppo_mini_batch_size=256  # prompts of an update; 4 updates a rollout
    actor_rollout_ref.rollout.n=4  # k
    trainer.total_epochs=15
    actor_rollout_ref.actor.optim.lr=1e-6  # AdamW, constant, weight decay 0.01
    actor_rollout_ref.actor.optim.clip_grad=0.25  # 1.0 there
    'actor_rollout_ref.actor.optim.override_optimizer_config={eps: 2.5e-9}'  # 1e-8 there

    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16  # memory alone; it was the scale there
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
    actor_rollout_ref.actor.fsdp_config.param_offload=True  # False there
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True  # False there
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    trainer.n_gpus_per_node=2
    trainer.nnodes=1

    trainer.project_name=gvpo
    trainer.experiment_name=qwen2.5-math-7b-gsm8k-math
    trainer.logger='[console]'
    trainer.save_freq=20
    trainer.test_freq=20
)
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
