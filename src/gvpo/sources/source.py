"""What completes a group: the protocol of everything that brings completions for a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gvpo.groups import Completion
from gvpo.models.encoding import encode_prompt
from gvpo.sources.dataset import Row


class Source(Protocol):
    """Anything that brings completions for prompts."""

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """At most wanted[i] new completions for row i, in order; the same objects are never handed out twice.

        seeds: one per row, all that a draw may depend on beside the source's own state. Rewards that the completions
        bring are kept; reward functions score those that bring none.
        """
        ...


def fill_one_by_one(
    source: Source,
    rows: Sequence[Row],
    wanted: Sequence[int],
    seeds: Sequence[int],
    drawn: Callable[[int, list[Completion]], None],
) -> None:
    """Fill, and hand over each row's completions, once, with the row's place: one by one where the source can."""
    if hasattr(source, "fill_one_by_one"):
        source.fill_one_by_one(rows, wanted, seeds, drawn)  # pyright: ignore[reportAttributeAccessIssue]
        return
    for place, completions in enumerate(source.fill(rows, wanted, seeds)):
        drawn(place, completions)


def prompt_ids(row: Row, tokenizer: Any | None) -> list[int]:
    """The row's prompt as the model reads it: its own ids, or its text encoded."""
    if row.prompt_ids is not None:
        return list(row.prompt_ids)
    assert row.prompt is not None and tokenizer is not None
    return encode_prompt(row.prompt, tokenizer)
