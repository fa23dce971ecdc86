"""Completions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted model): texts, without token ids.

Covered: chat messages through /chat/completions under the server's own chat template, strings and token ids through
/completions; several completions a request, or one where the server gives no more. Not covered: conversations that end
with a begun assistant turn (servers differ), streaming, log-probs. `top_k` is no part of the OpenAI protocol: it is
sent where it is above 0, and a server that does not know it may refuse it or take no notice.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gvpo.errors import UserError
from gvpo.groups import Completion
from gvpo.sampling.sampler import SamplingParams
from gvpo.server import ServerError, endpoint, post_json
from gvpo.sources.dataset import Row

T = TypeVar("T")

_SEEDS = 2**31  # servers differ in what they take; all take these
_REFUSED = (400, 422)
_ADVICE = "is it an OpenAI-compatible server?"


@dataclass
class ServerSource:
    """Completions drawn by the model that a server calls `model`.

    base_url: such as http://localhost:8000, to which /v1 is added where it has no path. timeout: seconds for one
    request. retries, total_seconds: as in `gvpo.server.post_json`. workers: requests at a time.
    A completion has its text, `truncated` where the server says that it ended by length, and in its meta `tokens`, how
    many it took; or `mean_tokens`, that of its request, where the server counts several completions together.
    """

    base_url: str
    model: str
    params: SamplingParams
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 5
    total_seconds: float = 1800.0
    workers: int = 32

    def __post_init__(self) -> None:
        endpoint(self.base_url, "completions")  # refuses what is no base URL
        self._gives_many = True

    def fill(self, rows: Sequence[Row], wanted: Sequence[int], seeds: Sequence[int]) -> list[list[Completion]]:
        """wanted[i] draws for row i; what a row gets depends on the seeds as far as the server heeds them.

        Raises UserError for a server that fails, refuses, or answers with something else; other rows' draws are lost.
        """
        return _in_threads(self._draw, list(zip(rows, wanted, seeds, strict=True)), self.workers)

    def _draw(self, row: Row, count: int, seed: int) -> list[Completion]:
        drawn: list[Completion] = []
        while len(drawn) < count:
            asked = count - len(drawn) if self._gives_many else 1
            try:
                more = self._request(row, asked, seed + len(drawn))
            except ServerError as error:
                if asked == 1 or error.status not in _REFUSED:
                    raise
                more = []
            if len(more) < asked:
                self._gives_many = False
            drawn += more[:asked]
        return drawn

    def _request(self, row: Row, count: int, seed: int) -> list[Completion]:
        chat = row.prompt is not None and not isinstance(row.prompt, str)
        url = endpoint(self.base_url, "chat/completions" if chat else "completions")
        prompt = {"messages" if chat else "prompt": row.prompt_ids if row.prompt is None else row.prompt}
        payload = {"model": self.model, **prompt, **_sampling(self.params), "n": count, "seed": seed % _SEEDS}
        how = {"timeout": self.timeout, "retries": self.retries, "total_seconds": self.total_seconds}
        return _completions(post_json(url, payload, api_key=self.api_key, **how), url)


def _sampling(params: SamplingParams) -> dict[str, Any]:
    sampling = {"max_tokens": params.max_new_tokens, "temperature": params.temperature, "top_p": params.top_p}
    return sampling | ({"top_k": params.top_k} if params.top_k else {})


def _completions(answer: dict[str, Any], url: str) -> list[Completion]:
    """The completions in an answer, in the order of their index. Raises UserError for anything else."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise UserError(
            f"{url}: an answer without completions ({str(answer)[:100]!r}); is it an OpenAI-compatible server?"
        )
    meta = _tokens(answer.get("usage"), len(choices))
    return [_completion(choice, meta, url) for choice in sorted(choices, key=_index)]


def _completion(choice: dict[str, Any], meta: dict[str, Any], url: str) -> Completion:
    message = choice.get("message")
    given = message if isinstance(message, dict) else choice
    text = given.get("content" if given is message else "text")
    # A model that is cut off while it reasons has said nothing yet; servers that part the two give null.
    thought = given.get("reasoning_content") or given.get("reasoning")
    if text is None and given is message:
        text = ""
    if not isinstance(text, str):
        raise UserError(f"{url}: a completion without text ({str(choice)[:100]!r}); {_ADVICE}")
    kept = meta | ({"reasoning": _writable(thought)} if isinstance(thought, str) else {})
    return Completion(_writable(text), source="server", truncated=choice.get("finish_reason") == "length", meta=kept)


def _writable(text: str) -> str:
    """JSON may escape half of a surrogate pair, which no file and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _tokens(usage: Any, count: int) -> dict[str, Any]:
    total = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(total, int):
        return {}
    return {"tokens": total} if count == 1 else {"mean_tokens": total / count}


def _in_threads(call: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[T]:
    """call(*job) for every job, so many at a time, in order; the first failure is raised at once.

    Daemon threads, unlike an executor's: a program that is told to end does not wait for a server that hangs.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for number in range(len(jobs)):
        todo.put(number)

    def work() -> None:
        while not stopped.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, call(*jobs[number]), None))
            except BaseException as error:
                done.put((number, None, error))

    results: list[Any] = [None] * len(jobs)
    try:
        for _ in range(min(workers, len(jobs))):
            threading.Thread(target=work, daemon=True).start()
        for _ in jobs:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
    finally:
        stopped.set()
    return results
