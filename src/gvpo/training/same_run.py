"""What makes a run the run that it is: what a resumed run must share with its checkpoint, and what it may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gvpo.errors import UserError
from gvpo.groups import group_to_dict
from gvpo.sources.dataset import Row
from gvpo.training.config import GVPOConfig

FIXED = (
    "objective",
    "seed",
    "shuffle_dataset",
    "prompt_column",
    "groups_per_update",
    "updates_per_rollout",
    "epochs_per_rollout",
)
"""Fields that decide which prompts come when, what is in flight, and what it is fitted to: another value, another run.
So do reference and sources, which are compared as they were resolved, and the dataset, by its rows and their hash."""

UNSAID = frozenset(
    {
        "output_dir",
        "run_name",
        "logging_steps",
        "num_completions_to_print",
        "disable_tqdm",
        "report_to",
        "save_steps",
        "publish_steps",
        "save_total_limit",
    }
)
"""Fields that change what is shown and kept, never a number: nobody needs to be told."""

RESOLVED = frozenset({"reference", "sources"})
"""Fields that are compared as what became of them."""


@dataclass
class RunIdentity:
    """A run, as its checkpoints remember it: reference and sources as they were resolved, and the dataset's rows."""

    config: GVPOConfig
    reference: str | int
    sources: list[Any]
    rows: Sequence[Row]

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What must not change, by name; JSON. The dataset is read through for it, once."""
        return {name: getattr(self.config, name) for name in FIXED} | {
            "reference": self.reference,
            "sources": self.sources,
            "dataset rows": len(self.rows),
            "dataset contents": _contents(self.rows),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The whole config; JSON."""
        return self.config.model_dump(mode="json")

    def check(self, fixed: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
        """Compare with what a checkpoint remembers. Returns what has changed, and may: "learning_rate 1e-05 -> 5e-06".

        Settings that only one of the two has, as a config file's `model` has no place in a GVPOConfig, are left out.
        Raises UserError naming everything that has changed, and must not.
        """
        ours = self.settings
        allowed = [
            f"{name} {settings[name]!r} -> {ours[name]!r}"
            for name in ours
            if name in settings and name not in {*FIXED, *RESOLVED, *UNSAID} and settings[name] != ours[name]
        ]
        refused = [
            f"{name} was {fixed.get(name)!r}, is {value!r}"
            for name, value in self.fixed.items()
            if fixed.get(name) != value
        ]
        if refused:
            others = f" (also changed, which is allowed: {'; '.join(allowed)})" if allowed else ""
            raise UserError(f"{'; '.join(refused)}: that is another run; resume with the run's own values{others}")
        return allowed


def _contents(rows: Iterable[Row]) -> str:
    """The beginning of a hash of all that the rows hold, in order; 64 bits."""
    digest = hashlib.sha256()
    for row in rows:
        held = [row.prompt, row.prompt_ids, sorted(row.columns.items())]
        if row.offline:
            held.append(group_to_dict(row.group())["completions"])
        # A run that writes a folder has only columns that JSON holds: what repr stands for was in no checkpoint.
        digest.update(json.dumps(held, default=repr).encode() + b"\n")
    return digest.hexdigest()[:16]
