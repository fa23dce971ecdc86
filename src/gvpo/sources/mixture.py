"""Which sources a run has, and how a rollout's prompts and whole groups are shared out over its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo.errors import UserError
from gvpo.sources.dataset import Row
from gvpo.sources.specs import DemonstrationSpec, FilesSpec, PolicySpec, ReplaySpec, Spec, TeacherSpec


@dataclass(frozen=True)
class Mixture:
    """The sources of a run as read_sources gives them: specs, and objects with `fill` that the caller made."""

    given: tuple[Any, ...]

    def one(self, kind: type[Any]) -> Any | None:
        """The source of a kind of which there is one at most."""
        return next((spec for spec in self.given if isinstance(spec, kind)), None)

    @property
    def replay(self) -> ReplaySpec | None:
        """What is replayed, if anything is."""
        return self.one(ReplaySpec)

    @property
    def files(self) -> FilesSpec | None:
        """Which files' groups are trained on, if any."""
        return self.one(FilesSpec)

    @property
    def demonstrations(self) -> list[DemonstrationSpec]:
        """The columns with reference answers."""
        return [spec for spec in self.given if isinstance(spec, DemonstrationSpec)]

    @property
    def fills(self) -> bool:
        """Whether a source completes the prompts of a dataset, not only brings groups of its own."""
        return any(not isinstance(spec, FilesSpec | ReplaySpec) for spec in self.given)

    @property
    def draws(self) -> bool:
        """Whether the policy is drawn from; a caller's own source is taken to do so."""
        return any(isinstance(spec, PolicySpec) or not isinstance(spec, Spec) for spec in self.given)

    def whole_per_update(self, groups_per_update: int) -> int:
        """Groups of each update that are not made for a prompt of the dataset, at most."""
        replayed = 0 if self.replay is None else self.replay.groups
        if self.files is None:
            return replayed
        return groups_per_update if self.files.groups is None else replayed + self.files.groups

    def described(self) -> list[Any]:
        """What a checkpoint remembers: each source's settings, or the name of its class; JSON."""
        return [spec.model_dump() if isinstance(spec, Spec) else type(spec).__name__ for spec in self.given]

    def check(self, num_generations: int, groups_per_update: int) -> None:
        """Refuse what cannot be beside each other. Raises UserError."""
        if problem := self._problem(num_generations, groups_per_update):
            raise UserError(f"config, field 'sources': {problem}")

    def _problem(self, num_generations: int, groups_per_update: int) -> str | None:
        for name, kind in (("policy", PolicySpec), ("replay", ReplaySpec), ("files", FilesSpec)):
            if sum(isinstance(spec, kind) for spec in self.given) > 1:
                return f"{name!r} is given twice; give it once"
        members = sum(
            spec.members for spec in self.given if isinstance(spec, ReplaySpec | DemonstrationSpec | TeacherSpec)
        )
        if self.one(PolicySpec) and members >= num_generations:
            return (
                f"{members} members from other sources leave the policy none of num_generations={num_generations}; "
                "lower members, raise num_generations, or leave out the policy"
            )
        if members > num_generations:
            return f"{members} members are more than num_generations={num_generations}; lower members, or raise it"
        if self.fills and not self.draws and members < 2:
            return "one completion a group teaches nothing; add {type: policy}, or raise members"
        if self.files is None and not self.fills:
            return "replay alone has nothing to replay; add {type: policy}"
        if self.files is not None and self.files.groups is None and len(self.given) > 1:
            return "files beside other sources need groups, how many of each update come from them"
        if self.files is not None and self.files.groups is not None and not self.fills:
            return "files alone make up every update; leave out groups, or add {type: policy} for the others"
        if (whole := self.whole_per_update(groups_per_update)) > groups_per_update:
            return f"{whole} whole groups are more than groups_per_update={groups_per_update}; lower groups"
        if whole == groups_per_update and self.replay is not None and self.replay.groups:
            return (
                f"{whole} whole groups leave no place for a new one in groups_per_update={groups_per_update}: the same "
                "ones would come again for ever; lower groups"
            )
        return None


def arrange(whole: Sequence[Row], prompts: Sequence[Row], updates: int) -> list[Row]:
    """Rows of a rollout in the order of its updates, each with the same share of whole groups, up to one.

    Every update has the same number of rows, len(whole) + len(prompts) over updates.
    """
    size = (len(whole) + len(prompts)) // updates
    rest = iter(prompts)
    rows: list[Row] = []
    for update in range(updates):
        share = whole[update::updates]
        rows += [*share, *(next(rest) for _ in range(size - len(share)))]
    return rows
