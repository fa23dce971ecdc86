from __future__ import annotations

import email.utils
import json
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gvpo import server
from gvpo.errors import UserError
from gvpo.server import ServerError, endpoint, post_json

Reply = tuple[int, bytes | dict[str, Any], dict[str, str]]


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler, bytes], Reply | None]) -> Iterator[str]:
    """A server on 127.0.0.1 whose every POST `answer` replies to; None where it has written the reply itself."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = answer(self, self.rfile.read(int(self.headers["Content-Length"])))
            if reply is None:
                return
            status, body, headers = reply
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_port}/v1/chat/completions"
    finally:
        web.shutdown()
        web.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is waited for."""
    asked: list[float] = []

    class Clock:
        """A clock that a pause moves on at once."""

        def __init__(self) -> None:
            self.skipped = 0.0

        def monotonic(self) -> float:
            return time.monotonic() + self.skipped

        def time(self) -> float:
            return time.time()

        def sleep(self, seconds: float) -> None:
            asked.append(seconds)
            self.skipped += seconds

    monkeypatch.setattr(server, "time", Clock())
    return asked


def scripted(*replies: Reply) -> tuple[Callable[[BaseHTTPRequestHandler, bytes], Reply], list[Any]]:
    seen: list[Any] = []

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> Reply:
        seen.append((dict(handler.headers), json.loads(body)))
        return replies[min(len(seen), len(replies)) - 1]

    return answer, seen


FINE: Reply = (200, {"choices": []}, {})
BUSY: Reply = (429, {"error": {"message": "slow\ndown"}}, {})


def test_json_goes_out_and_comes_back():
    answer, seen = scripted((200, {"text": "2 \u2264 3"}, {}))
    with serving(answer) as url:
        assert post_json(url, {"q": "\u00e9"}, api_key="k-1") == {"text": "2 \u2264 3"}
    ((headers, body),) = seen
    assert body == {"q": "\u00e9"}
    assert headers["Authorization"] == "Bearer k-1"
    assert headers["Content-Type"] == "application/json"


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    # A ~/.netrc, which some clients read, is not ours to send.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    answer, seen = scripted(FINE)
    with serving(answer) as url:
        post_json(url, {})
    assert "Authorization" not in seen[0][0]


def test_a_busy_server_is_asked_again(pauses: list[float]):
    answer, seen = scripted(BUSY, BUSY, FINE)
    with serving(answer) as url:
        assert post_json(url, {}) == {"choices": []}
    assert len(seen) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_statuses_that_pass(status: int, pauses: list[float]):
    answer, _ = scripted((status, {}, {}), FINE)
    with serving(answer) as url:
        assert post_json(url, {}) == {"choices": []}
    assert len(pauses) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_statuses_that_stay_are_told_at_once(status: int, pauses: list[float]):
    answer, _ = scripted((status, {"error": {"message": "no such model"}}, {}), FINE)
    with (
        serving(answer) as url,
        pytest.raises(ServerError, match=rf"{url}: HTTP status {status} \(no such model\): \w"),
    ):
        post_json(url, {})
    assert pauses == []


def test_retry_after_is_waited_for(pauses: list[float]):
    in_30_s = email.utils.formatdate(time.time() + 30, usegmt=True)
    answer, _ = scripted(
        (429, {}, {"Retry-After": "7"}),
        (503, {}, {"Retry-After": in_30_s}),
        (429, {}, {"Retry-After": "86400"}),
        (429, {}, {"Retry-After": "soon"}),
        FINE,
    )
    with serving(answer) as url:
        post_json(url, {}, retries=9)
    assert pauses[0] == 7
    assert 25 < pauses[1] <= 30
    assert pauses[2] == server.LONGEST_PAUSE
    assert 4 <= pauses[3] <= 8  # no number and no date: the fourth pause of the backoff


def test_it_gives_up_rather_than_wait_beyond_the_total(pauses: list[float]):
    answer, _ = scripted((429, {}, {"Retry-After": "20"}))
    with (
        serving(answer) as url,
        pytest.raises(ServerError, match=r"HTTP status 429.*allow more time \(3 attempts in"),
    ):
        post_json(url, {}, total_seconds=50, retries=9)
    assert pauses == [20, 20]


def test_a_server_that_always_fails(pauses: list[float]):
    answer, seen = scripted((500, b"<html>\x1b[31mout of memory</html>", {}))
    with serving(answer) as url, pytest.raises(ServerError) as error:
        post_json(url, {}, retries=2)
    assert len(seen) == 3
    expected = f"{url}: HTTP status 500 (<html> [31mout of memory</html>): look at the server's log (3 attempts in "
    assert str(error.value).startswith(expected)
    assert (error.value.status, error.value.cause) == (500, "HTTP status 500")
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.status, copy.cause) == (str(error.value), 500, "HTTP status 500")


def test_the_key_is_never_repeated():
    answer, _ = scripted((401, {"error": {"message": "wrong key sk-secret given"}}, {}))
    with serving(answer) as url, pytest.raises(ServerError, match=r"wrong key \*\*\* given.*API key") as error:
        post_json(url, {}, api_key="sk-secret")
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(status: int):
    target, seen = scripted(FINE)
    with serving(target) as elsewhere:
        answer, _ = scripted((status, b"", {"Location": elsewhere}))
        with (
            serving(answer) as url,
            pytest.raises(ServerError, match=f"status {status}: redirects are not.*'{elsewhere}'"),
        ):
            post_json(url, {}, api_key="sk-secret")
    assert seen == []


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_answers_that_are_no_json_object(body: bytes, pauses: list[float]):
    answer, _ = scripted((200, body, {}))
    with serving(answer) as url, pytest.raises(ServerError, match=r"an answer that is not a JSON object.*OpenAI"):
        post_json(url, {})
    assert pauses == []


def test_an_endless_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "LARGEST_ANSWER", 1 << 20)
    answer, _ = scripted((200, b" " * (1 << 21), {}))
    with serving(answer) as url, pytest.raises(ServerError, match="an answer above 1 MiB"):
        post_json(url, {})


def test_a_server_that_hangs(pauses: list[float]):
    released = threading.Event()

    def hang(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        released.wait(60)

    with serving(hang) as url:
        with pytest.raises(ServerError, match=r"no answer within 0\.1 s: allow more time.*\(2 attempts in"):
            post_json(url, {}, timeout=0.1, retries=1)
        released.set()


@pytest.mark.parametrize("start", [b"", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_a_server_that_trickles(start: bytes, pauses: list[float]):
    released = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.wfile.write(start)
        for _ in range(500):  # a byte well within the socket's own timeout
            if not released.wait(0.02):
                handler.wfile.write(b"H")

    with serving(trickle) as url:
        with pytest.raises(ServerError, match="no answer within 0"):
            post_json(url, {}, timeout=0.2, retries=0)
        released.set()


def test_nobody_listens(pauses: list[float]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(
        ServerError, match=r"the connection failed \(ConnectionRefused.*is the server running.*3 attempts"
    ):
        post_json(url, {}, retries=2)
    assert len(pauses) == 2


def test_a_connection_that_breaks_is_tried_again(pauses: list[float]):
    answers = iter([True, False])

    def once(handler: BaseHTTPRequestHandler, body: bytes) -> Reply | None:
        if next(answers):
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
            return None
        return FINE

    with serving(once) as url:
        assert post_json(url, {}) == {"choices": []}
    assert len(pauses) == 1


def test_the_global_random_numbers_are_left_alone(pauses: list[float]):
    random.seed(0)
    state = random.getstate()
    answer, _ = scripted(BUSY, FINE)
    with serving(answer) as url:
        post_json(url, {})
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1/chat/completions"),
        ("https://host/api/v2/", "https://host/api/v2/chat/completions"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
    ],
)
def test_endpoints(base: str, url: str):
    assert endpoint(base, "chat/completions") == url


@pytest.mark.parametrize(
    "base",
    ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://[::1", "", "http://u:p@h", "http://h?k=1"],
)
def test_wrong_addresses(base: str):
    with pytest.raises(UserError, match="http://host:port/v1"):
        endpoint(base, "chat/completions")


def test_a_key_with_a_line_break():
    with pytest.raises(UserError, match="the API key holds a line break") as error:
        post_json("http://127.0.0.1:1", {}, api_key="sk\n1")
    assert "sk" not in str(error.value)
