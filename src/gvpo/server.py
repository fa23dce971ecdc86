"""One small client for OpenAI-compatible servers: JSON is posted, failures are retried within a bound, then named.

Standard library alone. Proxies are taken from the environment as `urllib.request` does; certificates are the
system's (or SSL_CERT_FILE's). Redirects are not followed: the key goes to the server that was named and no other.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from gvpo.errors import UserError

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 60.0  # seconds; a server that asks for more is asked again after this
LARGEST_ANSWER = 64 * 2**20  # bytes

_HINTS = {
    401: "give the server's API key",
    403: "give an API key that may use this model",
    404: "check the base URL (it mostly ends in /v1) and the model's name",
    429: "send fewer requests at a time, or allow more time",
}
# Not the global generator: how often a server fails must not change what a seeded run draws.
_jitter = random.SystemRandom()


class ServerError(UserError):
    """A server that gave no answer, in one line; `status` is its HTTP status if it had one, `cause` a few words."""

    def __init__(self, url: str, cause: str, advice: str, *, status: int | None = None, detail: str = "") -> None:
        super().__init__(f"{url}: {cause}{f' ({detail})' if detail else ''}: {advice}")
        self.url, self.cause, self.advice, self.status, self.detail = url, cause, advice, status, detail

    def __reduce__(self) -> Any:
        return partial(ServerError, status=self.status, detail=self.detail), (self.url, self.cause, self.advice)


def endpoint(base_url: str, path: str) -> str:
    """The address of `path` ("chat/completions") under `base_url`, to which /v1 is added where it has no path.

    Raises UserError for a base URL without http(s) and a host, or with a password, a query or a fragment in it.
    """
    parts = _split(base_url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("base_url: write it as http://host:port/v1, without a user, a password, a query or a fragment")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}/{path}"


def post_json(
    url: str,
    payload: dict[str, Any],
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
    retries: int = 5,
    total_seconds: float = 300.0,
) -> dict[str, Any]:
    """Post `payload` as JSON and return the JSON object that comes back.

    timeout: seconds for one attempt, connection, waiting and reading together. total_seconds: for all attempts and
        the pauses between them; no attempt and no pause reaches beyond it.
    retries: attempts after the first one, for statuses in `RETRIED`, connections that fail and attempts that take too
        long. The n-th pause is drawn from 0.5 to 1 times 2^(n-1) seconds, or is the server's Retry-After if that is
        longer; never above `LONGEST_PAUSE`.
    Blocks its thread; safe in many threads at once.
    Raises ServerError (a UserError) that names the URL, what failed last, and what to do.
    """
    body = json.dumps(payload, allow_nan=False).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", **_authorization(api_key)}
    _split(url)
    start = time.monotonic()
    for attempt in range(retries + 1):
        left = start + total_seconds - time.monotonic()
        try:
            return _attempt(url, body, headers, min(timeout, left), api_key)
        except _Retry as failure:
            error, pause = failure.error, _pause(attempt, failure.after)
            gone = time.monotonic() - start
            if attempt >= retries or gone + pause >= total_seconds:
                tried = f"{attempt + 1} attempt{'s' * (attempt > 0)} in {gone:.0f} s"
                advice = f"{error.advice} ({tried})"
                raise ServerError(url, error.cause, advice, status=error.status, detail=error.detail) from None
            time.sleep(pause)
    raise AssertionError("retries is negative")


class _Retry(Exception):
    """An error that may be gone at the next attempt, and the seconds after which the server wants it."""

    def __init__(self, error: ServerError, after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


def _split(url: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"server address: {error}: write it as http://host:port/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"server address {url[:80]!r}: write it as http://host:port/v1")
    return parts


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise UserError("the API key holds a line break or a character that is not ASCII: copy it again")
    return {"Authorization": f"Bearer {api_key}"}


def _attempt(url: str, body: bytes, headers: dict[str, str], seconds: float, api_key: str | None) -> dict[str, Any]:
    watch = _Watch(seconds)
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        opener = urllib.request.build_opener(_Watched(watch), _NoRedirect())
        with opener.open(request, timeout=seconds) as response:
            raw = response.read(LARGEST_ANSWER + 1)
            if response.length and len(raw) <= LARGEST_ANSWER:  # read(n) says nothing of a body that breaks off
                raise http.client.IncompleteRead(raw, response.length)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_error(url, error, api_key) from None
    except (OSError, http.client.HTTPException) as error:
        raise _connection_error(url, error, watch, seconds) from None
    finally:
        watch.stop()
    if watch.over:  # a body whose end is the end of the connection just looks short
        raise _too_slow(url, seconds)
    return _object(url, raw)


def _object(url: str, raw: bytes) -> dict[str, Any]:
    if len(raw) > LARGEST_ANSWER:
        raise ServerError(url, f"an answer above {LARGEST_ANSWER >> 20} MiB", "ask for fewer or shorter completions")
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        detail = _plain(raw[:400].decode(errors="replace"), None)
        advice = "is this an OpenAI-compatible server?"
        raise ServerError(url, "an answer that is not a JSON object", advice, status=200, detail=detail)
    return answer


# Failures


def _status_error(url: str, error: urllib.error.HTTPError, api_key: str | None) -> Exception:
    status = error.code
    advice = _HINTS.get(status) or ("look at the server's log" if status >= 500 else "the server refuses the request")
    if 300 <= status < 400:
        advice = f"redirects are not followed; is the address {error.headers.get('Location', 'another')[:200]!r}?"
    detail = _plain(_message(error), api_key)
    failure = ServerError(url, f"HTTP status {status}", advice, status=status, detail=detail)
    return _Retry(failure, _retry_after(error.headers.get("Retry-After"))) if status in RETRIED else failure


def _connection_error(url: str, error: Exception, watch: _Watch, seconds: float) -> Exception:
    reason = getattr(error, "reason", error)  # urllib wraps what went wrong before the request was sent
    if watch.over or isinstance(reason, TimeoutError):
        return _too_slow(url, seconds)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ServerError(url, "a certificate that does not verify", "set SSL_CERT_FILE", detail=reason.verify_message)
    if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
        return ServerError(url, "no host of this name", "correct the address")
    detail = _plain(f"{type(reason).__name__}: {reason}", None)
    return _Retry(ServerError(url, "the connection failed", "is the server running at this address?", detail=detail))


def _too_slow(url: str, seconds: float) -> _Retry:
    return _Retry(ServerError(url, f"no answer within {seconds:.3g} s", "allow more time, or look at the server's log"))


def _message(error: urllib.error.HTTPError) -> str:
    """What an OpenAI-compatible server says in the body of an error, else the start of that body."""
    try:
        text = error.read(4000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    with suppress(ValueError, RecursionError):
        answer = json.loads(text)
        inner = answer.get("error", answer) if isinstance(answer, dict) else None
        message = inner.get("message") if isinstance(inner, dict) else inner
        return message if isinstance(message, str) else text
    return text


def _plain(text: str, api_key: str | None) -> str:
    """One short line of printable text that does not repeat the key."""
    if api_key:
        text = text.replace(api_key, "***")
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= 200 else line[:197] + "..."


# Time


def _pause(attempt: int, retry_after: float) -> float:
    backoff = _jitter.uniform(0.5, 1.0) * 2.0 ** min(attempt, 10)
    return min(max(backoff, retry_after), LONGEST_PAUSE)


def _retry_after(value: str | None) -> float:
    """Seconds in a Retry-After header, a number or a date (RFC 9110, 10.2.3); 0 where there is none to read."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


class _Watch:
    """Cuts a connection after so many seconds: a socket's own timeout starts anew with every byte that trickles in."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def start(self, sock: socket.socket) -> None:
        self._socket = sock
        if self.over:
            self._cut()

    def stop(self) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        self.over = True
        if self._socket is not None:
            with suppress(OSError):  # closed meanwhile
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Watched(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPConnection), req)  # pyright: ignore[reportArgumentType]

    def https_open(self, req: urllib.request.Request) -> Any:
        options = {"context": ssl.create_default_context()}
        return self.do_open(partial(self._connection, http.client.HTTPSConnection), req, **options)  # pyright: ignore[reportArgumentType]

    def _connection(self, kind: Any, host: str, **options: Any) -> Any:
        connection = kind(host, **options)
        connect = connection.connect

        def watched() -> None:
            connect()
            self.watch.start(connection.sock)

        connection.connect = watched
        return connection


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None
