"""From groups to token ids: prompt and completion are tokenized apart and concatenated; given ids stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gvpo.errors import UserError
from gvpo.groups import Completion, Group

_PROBE = "gvpo-probe"


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """Token ids of one group.

    prompt_ids: the prompt, at least one token. completion_ids: k lists, the end token included unless truncated.
    scored: k lists of the same lengths (False = given, not scored), or None where every token is scored.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    scored: list[list[bool] | None]

    def length(self, member: int) -> int:
        """Token positions of the prompt with one completion."""
        return len(self.prompt_ids) + len(self.completion_ids[member])


def encode_groups(groups: Sequence[Group], tokenizer: Any | None) -> list[EncodedGroup]:
    """Token ids of every group; ids that are given win over text, and need no tokenizer.

    Raises UserError where text must be encoded and there is no tokenizer, or the tokenizer has no chat template
    for a chat prompt.
    """
    return [_encode_group(group, tokenizer, f"group {index}") for index, group in enumerate(groups)]


def completed(group: Group, tokenizer: Any | None) -> Group:
    """The same group with all token ids, and (where there is a tokenizer) all texts, so that both are made once.

    Raises UserError as encode_groups does.
    """
    (encoded,) = encode_groups([group], tokenizer)
    prompt = _text(encoded.prompt_ids, tokenizer) if group.prompt is None else group.prompt
    members = [
        replace(one, token_ids=ids, text=_text(ids, tokenizer) if one.text is None else one.text)
        for one, ids in zip(group.completions, encoded.completion_ids, strict=True)
    ]
    return replace(group, prompt=prompt, prompt_ids=encoded.prompt_ids, completions=members)


def _text(token_ids: list[int], tokenizer: Any | None) -> str | None:
    return None if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)


def encode_prompt(prompt: str | list[dict], tokenizer: Any) -> list[int]:
    """Token ids of a prompt: chat messages through the template (no second BOS), strings as the tokenizer does.

    A string gets the tokenizer's beginning-of-sequence token if it adds one, never a trailing end token.
    """
    if isinstance(prompt, list):
        return list(tokenizer.encode(render_chat(prompt, tokenizer), add_special_tokens=False))
    ids = list(tokenizer.encode(prompt))
    end = tokenizer.eos_token_id
    # A lone end token is the beginning: some tokenizers have one token for both.
    if len(ids) > 1 and ids[-1] == end and list(tokenizer.encode(prompt, add_special_tokens=False))[-1:] != [end]:
        ids.pop()
    return ids


def render_chat(messages: list[dict], tokenizer: Any, *, add_generation_prompt: bool = True) -> str:
    """The text of a conversation under the tokenizer's chat template, ready for the assistant's turn.

    An assistant's last message is a turn that has begun: it stays open, and the completion goes on with it. With
    add_generation_prompt False the conversation is rendered as it stands.
    Raises UserError if there is no template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the prompt is a list of chat messages but the tokenizer has no chat template; "
            "use string prompts, or set tokenizer.chat_template"
        )
    from jinja2 import TemplateError

    begun = add_generation_prompt and messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not begun,
            continue_final_message=begun,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's chat template refuses the messages {messages!r:.200}: {error}") from error


def turn_end_id(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant turn; None if it ends with no special token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
    rendered = render_chat(turns, tokenizer, add_generation_prompt=False)
    _, found, tail = rendered.rpartition(_PROBE)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = tokenizer.encode(tail, add_special_tokens=False) if found else []
    return next((token for token in ids if token in special), None)


def end_token(prompt: str | list[dict] | None, tokenizer: Any) -> int | None:
    """The token that ends a completion of this prompt: the template's for chat, the tokenizer's for strings."""
    turn_end = turn_end_id(tokenizer) if isinstance(prompt, list) else None
    return tokenizer.eos_token_id if turn_end is None else turn_end


def end_token_ids(model: Any, tokenizer: Any | None) -> set[int]:
    """Every token at which sampling stops: generation config's, else the config's; the tokenizer's; the template's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    if tokenizer is not None:
        ends |= {tokenizer.eos_token_id, turn_end_id(tokenizer)}
    return {int(end) for end in ends if end is not None}


def _encode_group(group: Group, tokenizer: Any | None, where: str) -> EncodedGroup:
    needs_text = group.prompt_ids is None or any(completion.token_ids is None for completion in group.completions)
    if needs_text and tokenizer is None:
        raise UserError(f"{where} has text without token ids, and there is no tokenizer; pass tokenizer=, or give ids")
    prompt_ids = group.prompt_ids
    if prompt_ids is None:
        assert group.prompt is not None
        prompt_ids = encode_prompt(group.prompt, tokenizer)
    if not prompt_ids:
        raise UserError(f"{where}, field 'prompt': no tokens; the first completion token needs one before it")
    ended = any(completion.token_ids is None and not completion.truncated for completion in group.completions)
    end = end_token(group.prompt, tokenizer) if ended else None
    completion_ids = [
        _encode_completion(completion, end, tokenizer, f"{where}, member {member}")
        for member, completion in enumerate(group.completions)
    ]
    return EncodedGroup(list(prompt_ids), completion_ids, [completion.loss_mask for completion in group.completions])


def _encode_completion(completion: Completion, end: int | None, tokenizer: Any | None, where: str) -> list[int]:
    if completion.token_ids is not None:
        return list(completion.token_ids)
    assert tokenizer is not None
    ids = list(tokenizer.encode(completion.text, add_special_tokens=False))
    if completion.truncated:
        return ids
    if end is None:
        raise UserError(
            f"{where}: text that is not truncated gets an end token, and the tokenizer has none; "
            "set tokenizer.eos_token, or give token_ids"
        )
    return [*ids, end]
