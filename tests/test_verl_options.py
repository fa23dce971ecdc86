"""A run of this library in verl's names; verl is not needed."""

from __future__ import annotations

import pytest

from gvpo.errors import UserError
from gvpo.integrations.verl_runs.options import SAME, Facts, command, verl_options
from gvpo.training.config import RunConfig

OTHERWISE = """
reference top_k updates_per_rollout adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type warmup_steps
max_steps num_train_epochs token_budget use_vllm vllm_gpu_memory_utilization bf16 prompt_column reward_weights
output_dir run_name report_to eval_steps save_steps model train_dataset eval_dataset reward_funcs sources objective
reward_workers reward_timeout reward_memory
"""
"""Translated by a rule, written into the data or the script, or refused."""

WITHOUT = """
epsilon reference_storage trust_ref_logprobs allow_unanchored rollout_dtype vllm_mode vllm_server_base_url
vllm_enable_sleep_mode vllm_max_model_length share_prefix torch_compile disable_dropout logging_steps
num_completions_to_print disable_tqdm publish_steps
"""
"""verl has no counterpart, or decides itself."""

FACTS = Facts(prompts=100, longest_prompt=20, updates=10, reference="rollout", template=None, evaluates=True)


def options(facts: Facts = FACTS, **settings):
    run = RunConfig(train_dataset="rows.jsonl", reward_funcs="gsm8k_answer", **settings)
    return verl_options({name: getattr(run, name) for name in RunConfig.model_fields}, facts)


def test_every_setting_has_its_place():
    """Whoever adds a field to the config says here what becomes of it in verl."""
    assert sorted([*SAME, *OTHERWISE.split(), *WITHOUT.split()]) == sorted(RunConfig.model_fields)


def test_counts_of_updates_become_counts_of_rollouts():
    """3 updates a rollout, each batch twice: 6 updates a rollout; 10 updates are 2 rollouts, rounded up."""
    found = options(groups_per_update=4, updates_per_rollout=3, epochs_per_rollout=2, save_steps=7, eval_steps=6)
    assert found["data.train_batch_size"] == 12
    assert found["actor_rollout_ref.actor.ppo_mini_batch_size"] == 4
    assert found["trainer.total_training_steps"] == 2
    assert found["trainer.save_freq"] == 2
    assert found["trainer.test_freq"] == 1
    # 100 prompts are 8 whole batches of 12: one epoch has room for both rollouts.
    assert found["trainer.total_epochs"] == 1


def test_no_sequence_is_longer_than_a_micro_batch():
    name = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    assert options(max_completion_length=300, token_budget=100)[name] == 320
    assert options(max_completion_length=300, token_budget=1000)[name] == 1000


def test_a_run_that_says_nothing_saves_and_evaluates_at_its_end():
    found = options()
    assert found["trainer.save_freq"] == found["trainer.test_freq"] == found["trainer.total_training_steps"] == 5


def test_the_reference_is_scored_in_the_policys_precision():
    anchored = Facts(100, 20, 10, "initial", None, False)
    name = "fsdp_config.mixed_precision.param_dtype"
    assert (
        options(anchored)[f"+actor_rollout_ref.ref.{name}"] == options()[f"+actor_rollout_ref.actor.{name}"] == "fp32"
    )
    assert not [one for one in options(anchored, bf16=True) if "mixed_precision" in one]


def test_the_initial_reference_is_verls_reference_model_without_verls_own_term():
    facts = Facts(100, 20, 10, "initial", None, False)
    found = options(facts)
    assert found["+actor_rollout_ref.actor.policy_loss.gvpo_reference"] == "ref"
    assert found["actor_rollout_ref.actor.use_kl_loss"] is True
    assert found["actor_rollout_ref.actor.kl_loss_coef"] == 0
    assert "+actor_rollout_ref.actor.policy_loss.gvpo_reference" not in options()


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"objective": "grpo"}, FACTS, "objective is 'grpo'"),
        ({"lr_scheduler_type": "polynomial"}, FACTS, "lr_scheduler_type is 'polynomial'"),
        ({"sources": [{"type": "policy"}, {"type": "replay", "members": 2}]}, FACTS, "sources: verl draws all"),
        ({}, Facts(100, 20, 10, 4, None, False), "reference is 4"),
        ({"report_to": "all"}, FACTS, "report_to: 'all' is none of verl's"),
        ({"run_name": "${HOME}"}, FACTS, "trainer.experiment_name: verl would read"),
    ],
)
def test_what_would_be_another_run_is_refused(settings, facts, message):
    with pytest.raises(UserError, match=message):
        options(facts, **settings)


def test_what_is_written_is_read_back():
    """Strings that hydra would read as something else are in quotes; in them it unescapes before quotes alone."""
    assert command(
        {"a": "vllm", "b": "2024", "c": "it's {x}", "d": [1e-8, "m:f"], "e": {"eps": 1e-8}, "f": "true"}
    ) == [
        "a=vllm",
        "b='2024'",
        "c='it\\'s {x}'",
        "d=[1e-08, m:f]",
        "e={eps: 1e-08}",
        "f='true'",
    ]
