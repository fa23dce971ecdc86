"""What verl loads in every process: the entry point of the group `verl.plugins`, or VERL_USE_EXTERNAL_MODULES.

Importing registers the loss `gvpo`, has verl's actors use the training worker that makes it exact over whole groups,
and has its trainers keep groups whole. A failure is loud, though verl hides those of its plug-ins: it is logged, and
any use of the loss raises it.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any, NoReturn


def refuse(cause: Exception) -> None:
    """Have every use of the loss raise what kept the plug-in from loading."""

    def policy_loss(**_: Any) -> NoReturn:
        raise RuntimeError(f"gvpo's plug-in for verl did not load: {cause}") from cause

    logging.getLogger(__name__).error("gvpo's plug-in for verl did not load, loss_mode=gvpo will fail: %s", cause)
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    POLICY_LOSS_REGISTRY["gvpo"] = policy_loss


try:
    if tuple(int(part) for part in version("verl").split(".")[:2]) < (0, 9):
        raise ImportError(f"gvpo needs verl >= 0.9, and this is {version('verl')}: pip install --upgrade 'gvpo[verl]'")
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from gvpo.integrations.verl.driver import install
    from gvpo.integrations.verl.worker import GVPOTrainingWorker

    ActorRolloutRefWorker.actor_worker_cls = GVPOTrainingWorker
    install()
except Exception as cause:
    refuse(cause)
    raise
