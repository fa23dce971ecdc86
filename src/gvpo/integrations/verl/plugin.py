"""What verl loads in every process: the entry point of the group `verl.plugins`, or VERL_USE_EXTERNAL_MODULES.

Importing registers the loss `gvpo`, has verl's actors use the training worker that makes it exact over whole groups,
and has its trainers keep groups whole. A failure is loud, though verl hides those of its plug-ins: it is logged, and
any use of the loss raises it.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any, NoReturn

import verl
from packaging.version import Version


def refuse(cause: Exception) -> None:
    """Have every use of the loss raise what kept the plug-in from loading."""

    def policy_loss(**_: Any) -> NoReturn:
        raise RuntimeError(f"gvpo's plug-in for verl did not load: {cause}") from cause

    logging.getLogger(__name__).error("gvpo's plug-in for verl did not load, loss_mode=gvpo will fail: %s", cause)
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    POLICY_LOSS_REGISTRY["gvpo"] = policy_loss


def load_others() -> None:
    """verl's other plug-ins first: a platform among them must be there before the engines that are imported here."""
    allowed = os.getenv("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    for point in entry_points(group="verl.plugins"):
        if point.name != "gvpo" and (allowed == "auto" or point.name in allowed.split(",")):
            with suppress(Exception):  # verl loads it again, and says what is wrong with it
                point.load()


try:
    if Version(found := vars(verl)["__version__"]).release < (0, 9):
        raise ImportError(f"gvpo needs verl >= 0.9, and this is {found}: pip install --upgrade 'gvpo[verl]'")
    load_others()
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from gvpo.integrations.verl.driver import install
    from gvpo.integrations.verl.worker import GVPOTrainingWorker

    ActorRolloutRefWorker.actor_worker_cls = GVPOTrainingWorker
    install()
except Exception as cause:
    refuse(cause)
    raise
