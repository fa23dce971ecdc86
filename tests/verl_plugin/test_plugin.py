"""verl finds the plug-in by its entry point, and a plug-in that cannot load says so."""

from __future__ import annotations

import subprocess
import sys


def run(environment, code, **changes):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | changes, capture_output=True, text=True, timeout=200
    )


def test_importing_verl_is_enough(environment):
    code = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.engine_workers import ActorRolloutRefWorker
print(get_policy_loss_fn("gvpo").__module__, ActorRolloutRefWorker.actor_worker_cls.__name__)
"""
    done = run(environment, code)
    assert done.stdout.split() == ["gvpo.integrations.verl.worker", "GVPOTrainingWorker"], done.stderr[-2000:]


def test_without_entry_points_the_module_can_be_named(environment):
    code = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
print(get_policy_loss_fn("gvpo").__module__)
"""
    modules = environment["VERL_USE_EXTERNAL_MODULES"] + ",gvpo.integrations.verl.plugin"
    done = run(environment, code, VERL_USE_EXTERNAL_PLUGINS="none", VERL_USE_EXTERNAL_MODULES=modules)
    assert done.stdout.split() == ["gvpo.integrations.verl.worker"], done.stderr[-2000:]


def test_a_plugin_that_does_not_load_is_loud(environment, tmp_path):
    """verl hides the error at DEBUG; the loss raises it, with its cause."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['gvpo.integrations.verl.driver'] = None\n", encoding="utf-8"
    )
    code = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
get_policy_loss_fn("gvpo")(old_log_prob=None)
"""
    done = run(environment, code, PYTHONPATH=f"{tmp_path}:{environment['PYTHONPATH']}")
    assert done.returncode == 1
    assert "did not load" in done.stderr.splitlines()[-1]
    assert "gvpo.integrations.verl.driver" in done.stderr.splitlines()[-1]


def test_the_config_carries_beta_and_refuses_bad_ones(environment):
    code = """
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass
target = "gvpo.integrations.verl.GVPOPolicyLossConfig"
config = omega_conf_to_dataclass(OmegaConf.create({"_target_": target, "loss_mode": "gvpo", "gvpo_beta": 0.05}))
print(config.gvpo_beta, config.loss_mode)
omega_conf_to_dataclass(OmegaConf.create({"_target_": target, "gvpo_beta": 0}))
"""
    done = run(environment, code)
    assert done.stdout.split() == ["0.05", "gvpo"]
    assert "gvpo_beta is 0: it must be a number above 0" in done.stderr


def test_a_platform_that_is_a_plugin_comes_before_the_engines(environment, tmp_path):
    """verl's engines ask for the platform when they are imported, and this plug-in imports them."""
    (tmp_path / "their_platform.py").write_text(
        "from verl.plugin.platform import platform_manager\n"
        "import verl_on_cpu\n"
        "print('engines' if 'verl.workers.engine_workers' in __import__('sys').modules else 'first')\n"
    )
    info = tmp_path / "zz_theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zz-theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nzz_theirs = their_platform\n")
    # Last on the path, so that verl finds it after this one.
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import verl"
    code += "; from verl.utils.device import get_device_name; print(get_device_name())"
    done = run(environment, code, VERL_USE_EXTERNAL_MODULES="")
    assert done.stdout.split() == ["first", "cpu"], done.stderr[-2000:]
