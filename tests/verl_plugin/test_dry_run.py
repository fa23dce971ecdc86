"""Options checked against the verl that is installed; the recipes' among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gvpo.errors import UserError
from gvpo.integrations.verl_runs.dry_run import check_run

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "verl").glob("qwen*.sh"))
ACTOR = "actor_rollout_ref.actor"
ONE_GPU = "actor_rollout_ref.rollout.tensor_model_parallel_size"
THREE = [
    f"{ACTOR}.policy_loss.loss_mode=gvpo",
    f"{ACTOR}.policy_loss._target_=gvpo.integrations.verl.GVPOPolicyLossConfig",
    f"+{ACTOR}.policy_loss.gvpo_beta=0.1",
]
GRPO = [
    "algorithm.adv_estimator=grpo",
    f"{ACTOR}.use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
]


def test_a_grpo_command_with_three_options_more_is_gvpo():
    config, unchecked = check_run([*GRPO, *THREE])
    assert config.actor_rollout_ref.actor.policy_loss.gvpo_beta == 0.1
    assert unchecked == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_option_of_the_recipes_is_known(recipe):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", recipe, "--dry-run"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " options known to verl" in done.stdout
    assert "not checked" not in done.stdout


def test_there_are_recipes():
    assert len(RECIPES) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"{ACTOR}.ppo_mini_batch=3"], "did you mean actor_rollout_ref.actor.ppo_mini_batch_size?"),
        ([f"+{ACTOR}.ppo_mini_batch=3"], "did you mean ppo_mini_batch_size?"),
        (["trainerr.nnodes=2"], "trainerr"),
        ([*THREE, f"+{ACTOR}.policy_loss.gvpo_refernce=ref"], "did you mean gvpo_reference?"),
        ([*THREE[:2], f"{ACTOR}.policy_loss.gvpo_beta=1"], "write +actor_rollout_ref.actor.policy_loss.gvpo_beta"),
        ([*THREE, f"{ACTOR}.ppo_epochs=five"], "verl has a number here, such as 1"),
        ([*THREE[:2], f"+{ACTOR}.policy_loss.gvpo_beta=0"], "gvpo_beta is 0: it must be a number above 0"),
        ([*THREE, f"+{ACTOR}.policy_loss.gvpo_reference=new"], "gvpo_reference is 'new'"),
        (["nonsense"], "options are OPTION=VALUE"),
        ([*THREE[:2], f"+{ACTOR}.policy_loss.gvpo_beta=null"], "gvpo_beta is None: it must be a number above 0"),
        ([THREE[0], THREE[2]], "has no such field; loss_mode=gvpo needs its own settings: set"),
        (
            [THREE[0], f"{ACTOR}.policy_loss._target_=gvpo.integrations.verl.GVPOPolicyLosConfig", THREE[2]],
            "_target_: ",
        ),
        ([f"{ACTOR}.policy_loss.loss_mode=gvpoo"], f"{ACTOR}.policy_loss.loss_mode=gvpoo: did you mean gvpo?"),
        (["algorithm.adv_estimator=grop"], "algorithm.adv_estimator=grop: did you mean grpo?"),
        (["actor_rollout_ref.rollout.name=vlm"], "actor_rollout_ref.rollout.name=vlm: did you mean vllm?"),
        (["trainer.logger=[console,wnadb]"], "trainer.logger=wnadb: did you mean wandb?"),
        ([f"{ACTOR}.optim.lr_scheduler_type=linear"], f"{ACTOR}: AssertionError at "),
        ([f"~{ACTOR}"], "actor"),
        # How things divide, which verl asserts on after the first rollout.
        (
            ["trainer.n_gpus_per_node=3", "actor_rollout_ref.rollout.tensor_model_parallel_size=1"],
            "1024 rows: they must",
        ),
        (["trainer.n_gpus_per_node=3"], "3 GPUs: rollout engines take 2 each"),
        ([f"{ACTOR}.ppo_mini_batch_size=0"], "is 0 rows: they must"),
        # What the plug-in refuses, by name.
        ([*THREE, "actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n=1: a group of one teaches nothing"),
        (THREE[:1], "loss_mode=gvpo needs its own settings: set actor_rollout_ref.actor.policy_loss._target_="),
        ([*THREE, "skip.rollout_tq.enable=True"], "skip.rollout_tq.enable=True: "),
        ([*THREE, "algorithm.adv_estimator=gae"], "set algorithm.adv_estimator=grpo"),
        (["--config-name=ppo_megatron_trainer"], "--config-name=ppo_megatron_trainer: only OPTION=VALUE"),
        ([*THREE, f"+{ACTOR}.policy_loss.gvpo_reference=ref"], f"{ACTOR}.policy_loss.gvpo_reference=ref needs"),
        (
            [*THREE, "algorithm.rollout_correction.rollout_rs=token_k1"],
            "algorithm.rollout_correction.rollout_rs=token_k1 takes single tokens",
        ),
        (
            [*THREE, "algorithm.rollout_correction.bypass_mode=True", "trainer.use_v1=False"],
            "algorithm.rollout_correction.bypass_mode=True and trainer.use_v1=False",
        ),
        (
            [*THREE, "model_engine=megatron", f"+{ACTOR}.megatron.dynamic_context_parallel=True"],
            f"{ACTOR}.megatron.dynamic_context_parallel=True",
        ),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(UserError) as error:
        check_run([*GRPO, *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_approximate_or_without_effect_is_warned_of(caplog):
    options = [
        "algorithm.rollout_correction.rollout_is=sequence",
        f"{ACTOR}.shuffle=True",
        "actor_rollout_ref.rollout.temperature=0.8",
    ]
    check_run([*GRPO, *THREE, *options])
    said = "\n".join(record.message for record in caplog.records if record.message.startswith("gvpo: "))
    assert "rollout_is" in said and "shuffle" in said and "temperature" in said


def test_beta_may_be_left_at_its_default():
    check_run([*GRPO, *THREE[:2]])


def test_a_plugin_that_verl_does_not_load_is_said():
    """The dry run itself imports it; what counts is whether verl does."""
    command = [sys.executable, "-W", "ignore", "-m", "gvpo.integrations.verl_runs.dry_run", *GRPO, *THREE]
    changes = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": ""}
    done = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("dry run: verl does not load the plug-in: VERL_USE_EXTERNAL_PLUGINS")


def test_other_losses_are_left_alone():
    check_run([*GRPO, "algorithm.rollout_correction.rollout_rs=token_k1"])
