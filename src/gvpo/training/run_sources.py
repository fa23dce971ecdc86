"""A run's sources at work: what completes a prompt's group, and what brings whole groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gvpo.errors import UserError
from gvpo.groups import Group
from gvpo.sampling.sampler import Sampler, SamplingParams
from gvpo.sources.dataset import Row
from gvpo.sources.demonstration import DemonstrationSource
from gvpo.sources.policy import PolicySource, draw_seed
from gvpo.sources.replay import ReplayBuffer
from gvpo.sources.source import Source
from gvpo.sources.specs import DemonstrationSpec, PolicySpec, ReplaySpec, TeacherSpec
from gvpo.sources.teacher import load_teacher
from gvpo.training.checkpoint import Stateful
from gvpo.training.config import GVPOConfig
from gvpo.training.data_checks import check_group
from gvpo.training.plan import RunPlan
from gvpo.training.processes import OneProcess

LOOK_AGAIN = 0.5
"""Seconds between two looks into a folder that is followed."""

STILL_WAITING = 60.0
"""Seconds after which a run that waits for groups says so again."""


class RunSources:
    """members: what is asked, in turn, for the members of a prompt's group, the policy last. replay, files: None where
    the run has none."""

    def __init__(self, plan: RunPlan, config: GVPOConfig, sampler: Sampler, tokenizer: Any | None, model: Any) -> None:
        self._plan = plan
        self._config = config
        self.replay = None if plan.mixture.replay is None else ReplayBuffer(plan.mixture.replay, tokenizer)
        self.files = plan.files
        if self.files is not None:
            checks = partial(check_group, tokenizer=tokenizer, model=model, config=config)
            self.files.check = partial(checks, rewarded=bool(plan.reward_functions))
            for row in self.files.rows():
                self.files.check(row)
        params = SamplingParams(config.max_completion_length, config.temperature, config.top_p, config.top_k)
        self.members: list[Source] = []
        for spec in plan.mixture.given:
            match spec:
                case ReplaySpec():
                    assert self.replay is not None
                    self.members += [self.replay] if spec.members else []
                case DemonstrationSpec():
                    self.members.append(DemonstrationSource(spec))
                case TeacherSpec():
                    device = next(model.parameters()).device
                    how = (config.max_completion_length, config.rollout_dtype)
                    self.members.append(load_teacher(spec, tokenizer, device, *how))
                case _ if hasattr(spec, "fill"):
                    self.members.append(spec)
        self.policy = PolicySource(sampler, tokenizer, params) if plan.mixture.one(PolicySpec) else None
        self.members += [] if self.policy is None else [self.policy]

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Those with a state that a checkpoint must hold, by name; a caller's own are those with save and load."""
        own = [spec for spec in self._plan.mixture.given if hasattr(spec, "save") and hasattr(spec, "load")]
        named = {f"{place}-{type(source).__name__}": source for place, source in enumerate(own)}
        return {n: one for n, one in {"replay": self.replay, "files": self.files, **named}.items() if one is not None}

    def begin(self, rollout: int, update: int) -> None:
        """On every process, before this rollout (from 0) is drawn; update: how many are done."""
        if self.replay is not None:
            self.replay.rollout = rollout
        if self.policy is not None:
            self.policy.update = update

    def whole(
        self, rollout: int, update: int, processes: OneProcess, note: Callable[[str], None], look: Callable[[], None]
    ) -> list[Row]:
        """The next rollout's whole groups, as rows with completions: the files', then those that are replayed.

        Called on every process, with the same result. Waits for files where nothing else makes up an update; look: what
        all of them do meanwhile, again and again. rollout, update: how many are begun or done.
        Raises UserError for a file that cannot be used, and when the files have come to their end.
        """
        rows = [] if self.files is None else self._from_files(update, processes, note, look)
        if self.replay is not None and processes.is_main:
            seed = draw_seed(self._config.seed, rollout)
            rows += self.replay.whole(self.replay.spec.groups * self._config.updates_per_rollout, seed)
        return processes.share(rows)

    def metrics(self) -> dict[str, float]:
        """What is held, and what was passed over."""
        row = {} if self.replay is None else self.replay.ages()
        return row if self.files is None else row | {"files/stale": float(self.files.stale)}

    def _from_files(
        self, update: int, processes: OneProcess, note: Callable[[str], None], look: Callable[[], None]
    ) -> list[Row]:
        """On the main process the rows, on the others none."""
        files, config = self.files, self._config
        assert files is not None
        wanted = (files.spec.groups or config.groups_per_update) * config.updates_per_rollout
        rows = self._look_and_take(wanted, update) if processes.is_main else []
        said = -STILL_WAITING
        # The others come back from every exchange at once: one that waits for minutes runs into its time limit.
        while files.spec.groups is None and processes.share(len(rows) < wanted):
            look()
            if processes.is_main and not files.spec.follow:
                raise UserError(
                    f"{files.spec.path}: all groups are used, {files.stale} of them left out as stale; add groups, "
                    "raise uses or max_staleness, or lower max_steps"
                )
            if processes.is_main and time.monotonic() - said >= STILL_WAITING:
                said = time.monotonic()
                note(f"waiting for groups in {files.spec.path}: {len(rows)} of {wanted} are there")
            time.sleep(LOOK_AGAIN)
            if processes.is_main:
                rows += self._look_and_take(wanted - len(rows), update)
        return rows

    def _look_and_take(self, count: int, update: int) -> list[Row]:
        assert self.files is not None
        if self.files.spec.follow:
            self.files.look()
        return self.files.take(count, update=update)


def drawn_tokens(rows: Sequence[Row], groups: Sequence[Group]) -> int:
    """Tokens that were drawn for these groups now: not those of datasets, files, replay and demonstrations."""
    made = [group for row, group in zip(rows, groups, strict=True) if not row.offline]
    members = [one for group in made for one in group.completions if one.source not in ("replay", "demonstration")]
    return sum(len(one.token_ids or []) for one in members)
