"""An OpenAI-compatible server for the tests, in a thread of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]
"""HTTP status and the JSON that is answered."""


def chat_reply(*texts: str | None, reason: str = "stop", tokens: int | None = None) -> Reply:
    """An answer of /chat/completions with these texts."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for n, text in enumerate(texts)
    ]
    return 200, {"choices": choices, "usage": {} if tokens is None else {"completion_tokens": tokens}}


def text_reply(*texts: str, reason: str = "stop") -> Reply:
    """An answer of /completions with these texts."""
    return 200, {"choices": [{"index": n, "text": text, "finish_reason": reason} for n, text in enumerate(texts)]}


def error_reply(status: int, message: str) -> Reply:
    """A refusal as such servers word it."""
    return status, {"error": {"message": message}}


class Served:
    """url: of the server; requests: path, payload and headers of all that came, as they came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [payload for _, payload, _ in self.requests]


@contextmanager
def serving(reply: Callable[[str, dict[str, Any]], Reply]) -> Iterator[Served]:
    """A server that answers what `reply` makes of path and payload."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append((self.path, payload, dict(self.headers)))
            status, answer = reply(self.path, payload)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that did not wait

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
