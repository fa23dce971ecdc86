"""What follows from a config and its data: how many updates, against which reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gvpo.errors import UserError
from gvpo.sources.dataset import Row
from gvpo.training.config import GVPOConfig


def choose_reference(config: GVPOConfig, rows: Sequence[Row]) -> str | int:
    """The reference of a run: as configured, else "initial" for offline-only data and "rollout" where a source samples.

    Raises UserError for a moving reference on offline-only data, unless allow_unanchored.
    """
    offline = all(row.offline for row in rows)
    reference = config.reference or ("initial" if offline else "rollout")
    if offline and (reference == "rollout" or isinstance(reference, int)) and not config.allow_unanchored:
        raise UserError(
            f"config, field 'reference': {reference!r} on offline-only data has no anchor, the policy would collapse; "
            "use 'initial' or a model path, or set allow_unanchored"
        )
    return reference


def planned_updates(config: GVPOConfig, rows: int) -> int:
    """Updates in all: max_steps, or num_train_epochs over this many rows, each in epochs_per_rollout updates."""
    per_epoch = math.ceil(config.num_train_epochs * rows / config.groups_per_update)
    return config.max_steps or per_epoch * config.epochs_per_rollout
