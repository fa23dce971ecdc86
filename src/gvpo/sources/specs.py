"""What a config says of sources: one small model for each type, checked when the config is read; no torch needed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gvpo.errors import UserError, nearest

PositiveInt = Annotated[int, Field(ge=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicySpec(_Spec):
    """The policy draws what the other sources leave free of num_generations."""

    type: Literal["policy"] = "policy"


class ReplaySpec(_Spec):
    """Earlier members of the same prompt join its new group (members), and earlier groups come again whole (groups)."""

    type: Literal["replay"] = "replay"
    members: int = Field(0, ge=0, description="Earlier completions of the prompt in each new group, at most.")
    groups: int = Field(0, ge=0, description="Whole earlier groups in each update, at most.")
    capacity: PositiveInt = Field(1024, description="Groups that are kept, on disk.")
    per_prompt: PositiveInt | None = Field(None, description="Groups of one prompt that are kept. Default: no limit.")
    priority: Literal["uniform", "recency", "spread"] = Field(
        "recency",
        description="What is replayed more often and kept longer: 'recency' (weight 1 / (1 + rollouts since)), "
        "'spread' (standard deviation of the group's rewards), or 'uniform' (all alike; the oldest goes first).",
    )

    @model_validator(mode="after")
    def _replays_something(self) -> ReplaySpec:
        if not self.members and not self.groups:
            raise ValueError("replays nothing; give members (per new group), groups (per update), or both")
        return self


class DemonstrationSpec(_Spec):
    """Reference answers of a dataset column join the group, as members like any other."""

    type: Literal["demonstration"] = "demonstration"
    column: str = Field(min_length=1, description="Dataset column with an answer, or a list of answers.")
    members: PositiveInt = Field(1, description="Answers in each group, at most; the first ones.")
    reward: float | str | None = Field(
        None, description="Their reward: a number, a column with one for each answer, or computed by reward_funcs."
    )

    @field_validator("reward", mode="before")
    @classmethod
    def _is_finite(cls, reward: Any) -> Any:
        # Else a number that is refused as a number would be taken for the name of a column.
        if isinstance(reward, float) and not math.isfinite(reward):
            raise ValueError("give a finite number, or the name of a column")
        return reward


class TeacherSpec(_Spec):
    """Another model's draws join the group."""

    type: Literal["teacher"] = "teacher"
    model: str = Field(min_length=1, description="Hub id, folder, .gguf file, or smollm2-135m (embedded).")
    members: PositiveInt = Field(1, description="Its completions in each group.")
    temperature: float = Field(1.0, gt=0, description="Its sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Its nucleus sampling.")
    top_k: int = Field(0, ge=0, description="Its likeliest tokens to draw from; 0 = all.")


class FilesSpec(_Spec):
    """Whole groups from a file of groups, or from all files of a folder, in the order of their names."""

    type: Literal["files"] = "files"
    path: str = Field(min_length=1, description="A .jsonl or .parquet file of groups, or a folder of them.")
    groups: PositiveInt | None = Field(None, description="Groups in each update. Default: all of groups_per_update.")
    follow: bool = Field(False, description="Look for new files in the folder while the run goes on.")
    uses: PositiveInt = Field(1, description="How often each group is trained on, at most.")
    max_staleness: PositiveInt | None = Field(
        None,
        description="Groups that a policy drew more than this many updates ago are left out, and counted. Default: no "
        "limit; the loss needs none.",
    )


Spec = PolicySpec | ReplaySpec | DemonstrationSpec | TeacherSpec | FilesSpec

TYPES: dict[str, type[Spec]] = {spec.model_fields["type"].default: spec for spec in get_args(Spec)}


def read_sources(given: Any) -> list[Any]:
    """The sources that a config or a caller names: mappings become their spec; specs and objects with `fill` stay.

    given: one of these, or a list of them; None is the policy alone. Raises UserError for anything else.
    """
    if given is None:
        return [PolicySpec()]
    entries = given if isinstance(given, list | tuple) else [given]
    if not entries:
        raise UserError("sources: an empty list; leave it out to draw from the policy, or name one source or more")
    return [_read(entry, f"sources[{place}]") for place, entry in enumerate(entries)]


def _read(entry: Any, where: str) -> Any:
    if isinstance(entry, Spec) or hasattr(entry, "fill"):
        return entry
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{where}: a {type(entry).__name__}; give a mapping such as {{type: policy}}, or an object with "
            "fill(rows, wanted, seeds)"
        )
    kind = entry.get("type")
    if kind not in TYPES:
        raise UserError(f"{where}, field 'type': {kind!r} is unknown; {nearest(str(kind), TYPES)}")
    try:
        return TYPES[kind](**{str(name): value for name, value in entry.items()})
    except ValidationError as error:
        raise UserError(_explain(error, TYPES[kind], where)) from error


def _explain(error: ValidationError, spec: type[BaseModel], where: str) -> str:
    name, problem = first_problem(error, spec, f"it has {', '.join(spec.model_fields)}")
    return f"{where}: {problem}" if name is None else f"{where}, field {name!r}: {problem}"


def first_problem(error: ValidationError, model: type[BaseModel], otherwise: str) -> tuple[str | None, str]:
    """The field of the first mistake, None for a combination of several, and what is wrong with it.

    An unknown name gets the nearest of the model's fields as a hint, or `otherwise`.
    """
    first = error.errors()[0]
    problem = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return None, problem
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
        return name, f"unknown; {f'did you mean {near[0]!r}?' if near else otherwise}"
    given = "" if first["type"] == "missing" else f", got {first['input']!r:.100}"
    return name, f"{problem[:1].lower()}{problem[1:]}{given}"
