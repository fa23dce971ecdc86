"""Rows against rewards, tokenizer and model: mistakes that should stop a run before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo.errors import UserError
from gvpo.rewards.resolve import RewardFunction
from gvpo.sources.dataset import Row
from gvpo.sources.policy import prompt_ids


def check_rewards(
    rows: Sequence[Row], eval_rows: Sequence[Row], functions: Sequence[RewardFunction], weights: Sequence[float] | None
) -> None:
    """Every row must have rewards or get them. Raises UserError naming the row."""
    if weights is not None and len(weights) != len(functions):
        raise UserError(
            f"config, field 'reward_weights': {len(weights)} weights for {len(functions)} reward functions; give one each"
        )
    if functions:
        return
    if eval_rows:
        raise UserError(f"{eval_rows[0].where}: answers are drawn anew and need a reward function; give reward_funcs")
    for row in rows:
        if not row.has_rewards:
            raise UserError(f"{row.where}: no rewards, and no reward function; give reward_funcs")


def check_prompts(rows: Sequence[Row], tokenizer: Any | None, model: Any, max_completion_length: int) -> None:
    """Every prompt must be encodable, and leave room for a completion. Raises UserError naming the row."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        if tokenizer is None and row.prompt_ids is None:
            raise UserError(f"{row.where}: a text prompt, and no tokenizer; give tokenizer=, or rows with prompt_ids")
        if isinstance(row.prompt, list) and row.prompt_ids is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{row.where}, field 'prompt': chat messages, but the tokenizer has no chat template; "
                "use string prompts or an instruct model"
            )
        if context is None or _at_most(row) + max_completion_length <= context:
            continue
        length = len(prompt_ids(row, tokenizer))
        if length + (1 if row.offline else max_completion_length) > context:
            raise UserError(
                f"{row.where}, field 'prompt': {length} tokens and max_completion_length={max_completion_length} exceed "
                f"the model's context of {context}; shorten or drop the prompt, or lower max_completion_length"
            )


def _at_most(row: Row) -> int:
    """A bound on the prompt's tokens that needs no tokenizer: a token is at least a byte, a template adds some."""
    if row.prompt_ids is not None:
        return len(row.prompt_ids)
    return len(str(row.prompt).encode()) + 1024
