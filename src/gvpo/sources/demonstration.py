"""Reference answers from a dataset column as members of the group: same loss, no extra term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo.errors import FieldError, located
from gvpo.groups import Completion
from gvpo.sources.dataset import Row
from gvpo.sources.specs import DemonstrationSpec


@dataclass(frozen=True)
class DemonstrationSource:
    """The answers that the rows bring in one column."""

    spec: DemonstrationSpec

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """The first of each row's answers, spec.members and wanted[i] at most; none where the column is null."""
        return [
            demonstrations(row, self.spec)[: min(self.spec.members, count)]
            for row, count in zip(rows, wanted, strict=True)
        ]


def demonstrations(row: Row, spec: DemonstrationSpec) -> list[Completion]:
    """A row's reference answers with their rewards, None where reward functions are to give them.

    Raises UserError naming row and field for what is no answer or no reward.
    """
    with located(row.where):
        texts = _listed(row.columns.get(spec.column))
        rewards: list[Any] = [spec.reward] * len(texts)
        if isinstance(spec.reward, str):
            if spec.reward not in row.columns:
                raise FieldError(spec.reward, "missing; the rewards of the demonstrations are to be there")
            rewards = _listed(row.columns[spec.reward])
            if len(rewards) != len(texts):
                raise FieldError(
                    spec.reward, f"{len(rewards)} rewards for {len(texts)} answers in {spec.column!r}; give one each"
                )
        return [
            _demonstration(text, reward, place, spec)
            for place, (text, reward) in enumerate(zip(texts, rewards, strict=True))
        ]


def _demonstration(text: Any, reward: Any, place: int, spec: DemonstrationSpec) -> Completion:
    if not isinstance(text, str) or not text.strip():
        raise FieldError(spec.column, f"answer {place} (from 0) is {text!r:.60}; give a string that is not empty")
    try:
        return Completion(text, reward=reward, source="demonstration")
    except FieldError as error:
        field = spec.reward if error.field == "reward" and isinstance(spec.reward, str) else spec.column
        raise FieldError(str(field), error.problem) from None


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(plain) if isinstance(plain, list | tuple) else [plain]
