"""The group, the unit of everything: a prompt with its completions, checked when it is made.

Needs the standard library alone, so that tools which only read or write groups start at once. Files: `group_files`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from gvpo.errors import FieldError, UserError

_INT64_END = 2**63


@dataclass(slots=True)
class Completion:
    """One answer to a prompt, as text, as token ids, or both; where both are given the ids are what is scored.

    text: the answer, without an end token.
    token_ids: the answer as drawn, integers in [0, 2^63), its end token included unless truncated; a list, or a 1-D
        array or tensor, kept as a list of int.
    reward: finite, any range; None = not known, and the member leaves its group when the loss is taken.
    source: where it came from: "policy", "replay", "dataset", "demonstration", "teacher", or a name of your own.
    ref_logprob: log pi_theta'(y given x) in nats, summed over the scored tokens, the end token included.
    truncated: the answer stopped without an end token.
    loss_mask: one bool per token of token_ids; False = given, not scored (tool output in a dialogue).
    meta: anything worth keeping, under string keys; to be written to a file its values must be JSON.
    ref_token_logprobs, old_token_logprobs: nats, one number per token of token_ids, 0 where not scored: log-probs token
        by token under the reference, and under the policy that drew the group. Objectives on tokens need them.

    Raises FieldError. Fields assigned later are checked when the group is written.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    _: KW_ONLY
    reward: float | None = None
    source: str = "policy"
    ref_logprob: float | None = None
    truncated: bool = False
    loss_mask: list[bool] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    ref_token_logprobs: list[float] | None = None
    old_token_logprobs: list[float] | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.token_ids is None:
            raise FieldError("text", "neither 'text' nor 'token_ids' is given; give at least one")
        if self.text is not None:
            self.text = _string("text", self.text)
        if self.token_ids is not None:
            self.token_ids = _token_ids("token_ids", self.token_ids)
        if self.reward is not None:
            self.reward = _finite("reward", self.reward)
        if not _string("source", self.source):
            raise FieldError("source", "empty; name where the completion came from, such as 'policy' or 'dataset'")
        if self.ref_logprob is not None:
            if isinstance(_scalar(self.ref_logprob), bool):
                raise FieldError("ref_logprob", f"expected a log-probability in nats, got {_shown(self.ref_logprob)}")
            self.ref_logprob = _finite("ref_logprob", self.ref_logprob)
        for name in ("ref_token_logprobs", "old_token_logprobs"):
            setattr(self, name, _per_token(name, getattr(self, name), self.token_ids, "number", _finite))
        self.truncated = _bool("truncated", self.truncated)
        self.loss_mask = _per_token("loss_mask", self.loss_mask, self.token_ids, "boolean", _bool)
        self.meta = _string_keyed("meta", self.meta)


@dataclass(slots=True)
class Group:
    """A prompt with its k completions, k >= 1 (k >= 2 to teach anything).

    prompt: a string, a list of chat messages (each with a string "role" and a "content"), or None with prompt_ids.
    completions: the members in order. Equal members are draws with replacement and are all kept.
    prompt_ids: the prompt as token ids, at least one; where given they are what the model reads.
    id: a name for tables and messages.
    columns: the dataset row's further columns, which reach the reward functions.

    Raises FieldError.
    """

    prompt: str | list[dict[str, Any]] | None
    completions: list[Completion]
    _: KW_ONLY
    prompt_ids: list[int] | None = None
    id: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_ids is None:
            raise FieldError("prompt", "missing; give a string, a list of chat messages, or 'prompt_ids'")
        if self.prompt is not None:
            self.prompt = _prompt(self.prompt)
        self.completions = _some("completions", self.completions, "completions")
        for i, member in enumerate(self.completions):
            if not isinstance(member, Completion):
                raise FieldError(f"completions[{i}]", f"expected Completion(...), got {_shown(member)}; make it one")
        if self.prompt_ids is not None:
            self.prompt_ids = _token_ids("prompt_ids", _some("prompt_ids", self.prompt_ids, "token ids"))
        if self.id is not None:
            self.id = _string("id", self.id)
        self.columns = _string_keyed("columns", self.columns)

    @property
    def k(self) -> int:
        """The number of members."""
        return len(self.completions)

    @property
    def rewards(self) -> list[float | None]:
        """Each member's reward, in order."""
        return [completion.reward for completion in self.completions]


def teaching(group: Group) -> Group | None:
    """The group with only those members that have a reward; None if fewer than two have: it teaches nothing then.

    The members are shared with the group, not copied.
    """
    members = [completion for completion in group.completions if completion.reward is not None]
    return dataclasses.replace(group, completions=members) if len(members) >= 2 else None


def group_to_dict(group: Group) -> dict[str, Any]:
    """The group as a plain row (see `group_from_dict`), fields at their default left out; checks the group again.

    The row's values are JSON if those of `meta`, `columns` and the messages are. Raises FieldError.
    """
    if not isinstance(group, Group):
        raise UserError(f"expected a Group, got {_shown(group)}; `group_from_dict` makes one from a row")
    group = dataclasses.replace(group)
    row = {
        "id": group.id,
        "prompt": group.prompt,
        "prompt_ids": group.prompt_ids,
        "completions": [_completion_to_dict(i, member) for i, member in enumerate(group.completions)],
        "columns": group.columns or None,
    }
    return {name: value for name, value in row.items() if value is not None}


def group_from_dict(row: Mapping[str, Any]) -> Group:
    """The group that a row of a file or a dataset holds.

    A row is one of
    - a group: `id`, `prompt`, `prompt_ids`, `completions` (objects with the fields of `Completion`), `columns`. A null
      is a field left out; any other key is refused.
    - an offline row of a dataset: `prompt` and/or `prompt_ids`, `completions` (strings), `rewards` (one number or null
      per completion, or absent). Every other key, `id` too, is a column. The source is "dataset".

    Raises FieldError naming the field, or UserError for a row that is no mapping.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"expected an object with 'prompt' and 'completions', got {_shown(row)}")
    if row.get("completions") is None:
        raise FieldError("completions", "missing; give a list of strings or of objects")
    members = _some("completions", row["completions"], "strings or of objects")
    kind = str if isinstance(members[0], str) else Mapping
    for i, member in enumerate(members):
        if not isinstance(member, kind):
            expected = "a string or an object" if i == 0 else "the same kind as completions[0]"
            raise FieldError(f"completions[{i}]", f"expected {expected}, got {_shown(member)}")
    return _group_from_dataset_row(row, members) if kind is str else _group_from_row(row, members)


def _group_from_row(row: Mapping[str, Any], members: list[Mapping[str, Any]]) -> Group:
    fields: dict[str, Any] = {name: value for name, value in row.items() if value is not None}
    if "rewards" in fields:
        raise FieldError("rewards", "the completions are objects; give each its own 'reward' instead")
    _known(fields, Group, "; further columns go inside 'columns'")
    fields["completions"] = [_completion_from_dict(i, member) for i, member in enumerate(members)]
    fields.setdefault("prompt", None)
    return Group(**fields)


def _group_from_dataset_row(row: Mapping[str, Any], texts: list[str]) -> Group:
    columns = {name: value for name, value in row.items() if name not in DATASET_KEYS}
    rewards = [None] * len(texts) if row.get("rewards") is None else _elements("rewards", row["rewards"], "numbers")
    if len(rewards) != len(texts):
        counts = f"{_count(len(rewards), 'reward')} for {_count(len(texts), 'completion')}"
        raise FieldError("rewards", f"{counts}; give one number or null per completion")
    completions = [_dataset_completion(i, *member) for i, member in enumerate(zip(texts, rewards, strict=True))]
    return Group(row.get("prompt"), completions, prompt_ids=row.get("prompt_ids"), columns=columns)


DATASET_KEYS = frozenset({"prompt", "prompt_ids", "completions", "rewards"})
"""The keys of a dataset's row that are no columns."""


def _completion_to_dict(i: int, completion: Completion) -> dict[str, Any]:
    with _renamed(lambda name: f"completions[{i}].{name}"):
        completion = dataclasses.replace(completion)
    values = [(f, getattr(completion, f.name)) for f in dataclasses.fields(completion)]
    return {f.name: value for f, value in values if value not in (f.default, {})}


def _completion_from_dict(i: int, row: Mapping[str, Any]) -> Completion:
    with _renamed(lambda name: f"completions[{i}].{name}"):
        fields = {name: value for name, value in row.items() if value is not None}
        _known(fields, Completion)
        return Completion(**fields)


def _dataset_completion(i: int, text: str, reward: float | None) -> Completion:
    with _renamed(lambda name: f"rewards[{i}]" if name == "reward" else f"completions[{i}]"):
        return Completion(text, reward=reward, source="dataset")


@contextmanager
def _renamed(rename: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except FieldError as error:
        raise FieldError(rename(error.field), error.problem) from None


def _known(names: Mapping[str, Any], owner: type[Group] | type[Completion], hint: str = "") -> None:
    valid = [f.name for f in dataclasses.fields(owner)]
    for name in names:
        if name not in valid:
            nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)[0]
            raise FieldError(str(name), f"unknown; the nearest valid name is {nearest!r} (of {', '.join(valid)}){hint}")


def _prompt(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return _string("prompt", value)
    messages = _some("prompt", value, "chat messages (or give a string)")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise FieldError(f"prompt[{i}]", f"expected a message with 'role' and 'content', got {_shown(message)}")
        _string(f"prompt[{i}].role", message.get("role"))
        if "content" not in message:
            raise FieldError(f"prompt[{i}].content", "missing; a message has a 'role' and a 'content'")
        if isinstance(message["content"], str):
            _string(f"prompt[{i}].content", message["content"])
    return [dict(message) for message in messages]


def _token_ids(name: str, value: Any) -> list[int]:
    tokens = [_scalar(token) for token in _elements(name, value, "token ids")]
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < _INT64_END:  # bool is an int to isinstance, and no token id
            raise FieldError(f"{name}[{i}]", f"expected an integer from 0 to 2^63 - 1, got {_shown(token)}")
    return tokens


def _per_token(name: str, value: Any, token_ids: list[int] | None, kind: str, check: Callable[[str, Any], Any]) -> Any:
    """The checked entries of a list that goes with token_ids; None where there is none."""
    if value is None:
        return None
    entries = [check(f"{name}[{i}]", element) for i, element in enumerate(_elements(name, value, f"{kind}s"))]
    if token_ids is None:
        raise FieldError(name, f"given without 'token_ids'; it has a {kind} for each of them, so give both")
    if len(entries) != len(token_ids):
        counts = f"{_count(len(entries), 'entry', 'entries')} for {_count(len(token_ids), 'token')}"
        raise FieldError(name, f"{counts}; give one {kind} per token of 'token_ids'")
    return entries


def _finite(name: str, value: Any) -> float:
    number = _scalar(value)
    if not isinstance(number, numbers.Real):
        raise FieldError(name, f"expected a number, got {_shown(value)}; give a finite number or null (None)")
    try:
        finite = float(number)
    except OverflowError:
        finite = math.inf
    if not math.isfinite(finite):
        raise FieldError(name, f"{finite} is non-finite; give a finite number or null (None)")
    return finite


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"expected a string, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # neither a file nor a tokenizer could take it
        raise FieldError(name, f"half of a surrogate pair at character {error.start + 1}; remove it") from None
    return value


def _bool(name: str, value: Any) -> bool:
    plain = _scalar(value)
    if not isinstance(plain, bool):
        raise FieldError(name, f"expected true or false, got {_shown(value)}")
    return plain


def _string_keyed(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise FieldError(name, f"expected an object with string keys, got {_shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise FieldError(name, f"expected string keys, got {_shown(key)}")
    return dict(value)


def _some(name: str, value: Any, what: str) -> list[Any]:
    elements = _elements(name, value, what)
    if not elements:
        raise FieldError(name, "an empty list; give at least one entry, or drop the row")
    return elements


def _elements(name: str, value: Any, what: str) -> list[Any]:
    """A new list with the elements of a list, tuple, array or tensor (known by `tolist`: neither is imported here)."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(plain, list | tuple):
        raise FieldError(name, f"expected a list of {what}, got {_shown(value)}")
    return list(plain)


def _scalar(value: Any) -> Any:
    """The Python number in a numpy scalar or a 0-d array or tensor; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """A value for a one-line message: short, and by its type alone where it may be long."""
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return str(value)
    return f"{reprlib.repr(value)} ({kind})" if isinstance(value, str | int | float) else kind


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
