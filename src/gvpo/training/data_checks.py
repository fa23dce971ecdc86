"""Rows against rewards, tokenizer and model: mistakes that should stop a run before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gvpo.errors import UserError, located
from gvpo.groups import Completion
from gvpo.models.encoding import encode_groups, render_chat
from gvpo.rewards.resolve import RewardFunction
from gvpo.sources.dataset import Row
from gvpo.sources.demonstration import demonstrations
from gvpo.sources.source import prompt_ids
from gvpo.sources.specs import DemonstrationSpec
from gvpo.training.config import GVPOConfig


def check_rewards(
    rows: Iterable[Row], eval_rows: Sequence[Row], functions: Sequence[RewardFunction], weights: Sequence[float] | None
) -> None:
    """Every row must have rewards or get them. Raises UserError naming the row."""
    if weights is not None and len(weights) != len(functions):
        raise UserError(
            f"config, field 'reward_weights': {len(weights)} weights for {len(functions)} reward functions; "
            "give one each"
        )
    if functions:
        return
    if eval_rows:
        raise UserError(f"{eval_rows[0].where}: answers are drawn anew and need a reward function; give reward_funcs")
    for row in rows:
        if not row.has_rewards:
            raise UserError(f"{row.where}: no rewards, and no reward function; give reward_funcs")


def check_answers(rows: Iterable[Row], functions: Sequence[RewardFunction]) -> None:
    """What `math_accuracy` is to compare with must be answers. Raises UserError naming the row."""
    if not any(getattr(one.function, "__module__", None) == "gvpo.rewards.math" for one in functions):
        return
    from gvpo.rewards.math import accepted_answers

    for row in rows:
        if row.columns.get("answers") is not None:
            with located(row.where):
                accepted_answers(row.columns["answers"])


def check_demonstrations(
    rows: Sequence[Row], specs: Sequence[DemonstrationSpec], functions: Sequence[RewardFunction]
) -> None:
    """Every reference answer must be readable, and some row must have one. Raises UserError naming row and field."""
    for spec in specs:
        found = [row for row in rows if demonstrations(row, spec)]
        if not found:
            name = f"field {spec.column!r}"
            raise UserError(f"{rows[0].where}, {name}: neither this row nor any other has a demonstration there")
        if spec.reward is None and not functions:
            raise UserError(
                f"{found[0].where}, field {spec.column!r}: a demonstration without a reward, and no reward function; "
                "give the source a reward, or give reward_funcs"
            )


def check_prompts(
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    tokenizer: Any | None,
    model: Any,
    config: GVPOConfig,
    specs: Sequence[DemonstrationSpec] = (),
    *,
    from_file: bool = False,
) -> None:
    """Every prompt must be encodable, and fit the model and the token budget with its completions, those of specs too.

    from_file: the rows were read from one, which may have been made with another tokenizer.
    Raises UserError naming the row.
    """
    context, vocabulary = _limits(model)
    for row in [*rows, *eval_rows]:
        _check_ids(row, vocabulary)
    if getattr(tokenizer, "chat_template", None):
        _check_template([*rows, *eval_rows], tokenizer)
    for row in rows:
        _check_row(row, tokenizer, config, context, from_file=from_file)
    for row, spec in [(row, spec) for spec in specs for row in rows if not row.offline]:
        _check_demonstration(row, spec, tokenizer, config, context)
    for row in eval_rows:  # answers are drawn anew, whatever the row brings, and not back-propagated
        _check_encodable(row, (), tokenizer)
        _check_length(row, (), tokenizer, config.max_completion_length, context, None)


def check_group(row: Row, tokenizer: Any | None, model: Any, config: GVPOConfig, *, rewarded: bool) -> None:
    """A group from a file must be one that this model and tokenizer can be trained on.

    rewarded: there are reward functions for those without rewards. Raises UserError naming the row.
    """
    context, vocabulary = _limits(model)
    if not row.has_rewards and not rewarded:
        raise UserError(f"{row.where}: no rewards, and no reward function; give reward_funcs, or `gvpo score` the file")
    _check_ids(row, vocabulary)
    _check_row(row, tokenizer, config, context, from_file=True)


def _check_row(row: Row, tokenizer: Any | None, config: GVPOConfig, context: int | None, *, from_file: bool) -> None:
    _check_encodable(row, row.completions, tokenizer)
    _check_length(row, row.completions, tokenizer, config.max_completion_length, context, config.token_budget)
    if from_file:
        _check_texts(row, tokenizer)


def _check_texts(row: Row, tokenizer: Any | None) -> None:
    """Token ids that come with their text must be this tokenizer's."""
    for place, one in enumerate(row.completions):
        if tokenizer is None or one.text is None or one.token_ids is None:
            continue
        text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
        if text.strip() != one.text.strip():
            raise UserError(
                f"{row.where}, field 'completions[{place}].token_ids': they are {text!r:.60} to this tokenizer and "
                f"{one.text!r:.60} as text; were they made by another tokenizer? Remove the ids, or the text"
            )


def _limits(model: Any) -> tuple[int | None, int]:
    """The model's context, None if it states none, and the size of its vocabulary."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context, len(model.get_input_embeddings().weight)


def _check_demonstration(
    row: Row, spec: DemonstrationSpec, tokenizer: Any | None, config: GVPOConfig, context: int | None
) -> None:
    answers = demonstrations(row, spec)[: spec.members]
    if not answers:
        return
    _check_encodable(row, answers, tokenizer)
    (encoded,) = encode_groups([row.group(answers)], tokenizer)
    longest = max(map(len, encoded.completion_ids))
    if longest > config.max_completion_length:
        raise UserError(
            f"{row.where}, field {spec.column!r}: a demonstration of {longest} tokens is longer than "
            f"max_completion_length={config.max_completion_length}; raise it, or shorten or drop the row"
        )
    _check_length(row, answers, tokenizer, config.max_completion_length, context, config.token_budget)


def check_columns(rows: Sequence[Row]) -> None:
    """What a run folder keeps must be JSON. Raises UserError naming row and field."""
    for row in rows:
        metas = [(f"completions[{place}].meta", one.meta) for place, one in enumerate(row.completions)]
        for name, value in [*row.columns.items(), *metas]:
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{row.where}, field {name!r}: cannot be kept in output_dir ({error}); convert or drop it"
                ) from error


def _check_encodable(row: Row, completions: Sequence[Completion], tokenizer: Any | None) -> None:
    texts = ["prompt"] if row.prompt_ids is None else []
    texts += ["completions" for completion in completions if completion.token_ids is None]
    if texts and tokenizer is None:
        raise UserError(
            f"{row.where}, field {texts[0]!r}: text, and there is no tokenizer; give tokenizer=, or rows with token ids"
        )
    if row.prompt_ids is not None:
        return
    if isinstance(row.prompt, list) and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{row.where}, field 'prompt': chat messages, but the tokenizer has no chat template; "
            "use string prompts or an instruct model"
        )
    if isinstance(row.prompt, str) and not row.prompt.strip() and not prompt_ids(row, tokenizer):
        raise UserError(f"{row.where}, field 'prompt': empty; the first completion token needs a token before it")


def _check_template(rows: Sequence[Row], tokenizer: Any) -> None:
    # Templates refuse by roles and kinds of content: the first of each sort is enough.
    first: dict[tuple[tuple[str, type], ...], Row] = {}
    for row in rows:
        if isinstance(row.prompt, list) and row.prompt_ids is None:
            first.setdefault(tuple((message["role"], type(message["content"])) for message in row.prompt), row)
    for row in first.values():
        assert isinstance(row.prompt, list)
        with located(row.where):
            render_chat(row.prompt, tokenizer)


def _check_ids(row: Row, vocabulary: int) -> None:
    given = [("prompt_ids", row.prompt_ids)]
    given += [(f"completions[{place}].token_ids", one.token_ids) for place, one in enumerate(row.completions)]
    for name, ids in given:
        if ids and max(ids) >= vocabulary:
            raise UserError(
                f"{row.where}, field {name!r}: token id {max(ids)} is outside the model's vocabulary of {vocabulary}; "
                "were the ids made by another tokenizer?"
            )


def _check_length(
    row: Row,
    completions: Sequence[Completion],
    tokenizer: Any | None,
    max_completion_length: int,
    context: int | None,
    token_budget: int | None,
) -> None:
    limits = [limit for limit in (context, token_budget) if limit is not None]
    longest = max(map(_at_most, completions), default=max_completion_length)
    if not limits or _prompt_at_most(row) + longest <= min(limits):
        return
    length = len(prompt_ids(row, tokenizer))
    what, advice = f"max_completion_length={longest}", "shorten or drop the prompt, or lower max_completion_length"
    if completions:
        (encoded,) = encode_groups([row.group(completions)], tokenizer)
        longest = max(map(len, encoded.completion_ids))
        what, advice = f"a completion of {longest}", "shorten or drop the row"
    if context is not None and length + longest > context:
        exceeded = f"the model's context of {context}"
    elif token_budget is not None and length + longest > token_budget:
        exceeded, advice = f"token_budget={token_budget}", f"raise token_budget; or {advice}"
    else:
        return
    raise UserError(f"{row.where}, field 'prompt': {length} tokens and {what} exceed {exceeded}; {advice}")


def _prompt_at_most(row: Row) -> int:
    """A bound on the prompt's tokens that needs no tokenizer: a token is at least a byte, a template adds some."""
    if row.prompt_ids is not None:
        return len(row.prompt_ids)
    return len(str(row.prompt).encode()) + 1024


def _at_most(completion: Completion) -> int:
    """The same for a completion, with its end token."""
    if completion.token_ids is not None:
        return len(completion.token_ids)
    return len((completion.text or "").encode()) + 1
