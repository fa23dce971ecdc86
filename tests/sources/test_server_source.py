"""Completions from a server: what is asked, what is made of the answers, and what failures come to."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from gvpo.errors import UserError
from gvpo.sampling.sampler import SamplingParams
from gvpo.sources.dataset import Row
from gvpo.sources.server import ServerSource
from sources.completions_server import Reply, chat_reply, error_reply, serving, text_reply

PARAMS = SamplingParams(64, temperature=0.6, top_p=0.95)
MESSAGES = [{"role": "user", "content": "2 + 2?"}]


def row(prompt: str | list[dict[str, str]] | None, ids: list[int] | None = None) -> Row:
    return Row(prompt, ids, {}, (), "row")


def texts(filled: list[list[Any]]) -> list[list[str]]:
    return [[one.text for one in members] for members in filled]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gvpo.server.time.sleep", lambda seconds: None)


class TestRequests:
    def test_messages_go_to_chat_with_all_that_was_set(self) -> None:
        with serving(lambda path, payload: chat_reply("4", "four")) as served:
            source = ServerSource(served.url, "m", SamplingParams(64, 0.6, 0.95, 20), api_key="secret")
            (members,) = source.fill([row(MESSAGES)], [2], [2**40 + 7])
        ((path, payload, headers),) = served.requests
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert payload == {
            "model": "m",
            "messages": MESSAGES,
            "max_tokens": 64,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "n": 2,
            "seed": 7,  # below 2^31
        }
        assert [(one.text, one.source, one.truncated, one.token_ids) for one in members] == [
            ("4", "server", False, None),
            ("four", "server", False, None),
        ]
        assert "secret" not in repr(source)

    @pytest.mark.parametrize("prompt", ["2 + 2 =", None])
    def test_strings_and_ids_go_to_completions(self, prompt: str | None) -> None:
        ids = [5, 6] if prompt is None else None
        with serving(lambda path, payload: text_reply(" 4", reason="length")) as served:
            ((member,),) = ServerSource(served.url + "/v1/", "m", PARAMS).fill([row(prompt, ids)], [1], [3])
        ((path, payload, _),) = served.requests
        assert (path, payload["prompt"]) == ("/v1/completions", prompt or ids)
        assert "messages" not in payload and "top_k" not in payload
        assert (member.text, member.truncated) == (" 4", True)

    def test_rows_keep_their_order_and_seeds_whoever_answers_first(self) -> None:
        later = threading.Event()

        def reply(path: str, payload: dict[str, Any]) -> Reply:
            # The first row's request is answered when the last row's is.
            later.set() if payload["prompt"] == "2" else later.wait(10)
            return text_reply(f"{payload['prompt']}:{payload['seed']}")

        with serving(reply) as served:
            filled = ServerSource(served.url, "m", PARAMS, workers=3).fill(
                [row("0"), row("1"), row("2")], [1, 0, 1], [10, 11, 12]
            )
        assert texts(filled) == [["0:10"], [], ["2:12"]]

    def test_no_more_requests_at_a_time_than_workers(self) -> None:
        busy, most, lock = 0, 0, threading.Lock()
        together = threading.Barrier(2, timeout=10)

        def reply(path: str, payload: dict[str, Any]) -> Reply:
            nonlocal busy, most
            with lock:
                busy += 1
                most = max(most, busy)
            together.wait()
            with lock:
                busy -= 1
            return text_reply("a")

        with serving(reply) as served:
            ServerSource(served.url, "m", PARAMS, workers=2).fill([row(str(n)) for n in range(8)], [1] * 8, [0] * 8)
        assert most == 2


class TestSeveral:
    @pytest.mark.parametrize("status", [400, 422])
    def test_a_server_that_refuses_several_is_asked_one_by_one(self, status: int) -> None:
        def reply(path: str, payload: dict[str, Any]) -> Reply:
            if payload["n"] > 1:
                return error_reply(status, "only one completion choice is allowed")
            return chat_reply(str(payload["seed"]), tokens=9)

        with serving(reply) as served:
            source = ServerSource(served.url, "m", PARAMS, workers=1)
            filled = source.fill([row(MESSAGES), row(MESSAGES)], [3, 2], [100, 200])
        assert texts(filled) == [["100", "101", "102"], ["200", "201"]]
        assert [payload["n"] for payload in served.payloads] == [3, 1, 1, 1, 1, 1]
        assert all(one.meta == {"tokens": 9} for members in filled for one in members)

    def test_a_server_that_takes_no_notice_is_asked_for_the_rest(self) -> None:
        with serving(lambda path, payload: chat_reply(str(payload["seed"]))) as served:
            filled = ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [3], [5])
        assert texts(filled) == [["5", "6", "7"]]
        assert [payload["n"] for payload in served.payloads] == [3, 1, 1]

    def test_more_than_was_asked_for_is_left(self) -> None:
        with serving(lambda path, payload: chat_reply("a", "b", "c")) as served:
            assert texts(ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [2], [0])) == [["a", "b"]]

    def test_a_refusal_of_one_is_told(self) -> None:
        with (
            serving(lambda path, payload: error_reply(400, "too long for the context")) as served,
            pytest.raises(UserError, match=r"chat/completions: HTTP status 400 \(too long for the context\)"),
        ):
            ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [2], [0])

    def test_tokens_counted_together_are_a_mean(self) -> None:
        with serving(lambda path, payload: chat_reply("a", "b", tokens=30)) as served:
            (members,) = ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [2], [0])
        assert [one.meta for one in members] == [{"mean_tokens": 15.0}] * 2


class TestAnswers:
    def test_choices_come_by_index(self) -> None:
        choices = [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]
        with serving(lambda path, payload: (200, {"choices": choices})) as served:
            assert texts(ServerSource(served.url, "m", PARAMS).fill([row("p")], [2], [0])) == [["a", "b"]]

    def test_a_model_cut_off_in_its_thoughts_has_said_nothing(self) -> None:
        status, answer = chat_reply(None, reason="length")
        answer["choices"][0]["message"]["reasoning_content"] = "so far"
        with serving(lambda path, payload: (status, answer)) as served:
            ((member,),) = ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [1], [0])
        assert (member.text, member.truncated, member.meta) == ("", True, {"reasoning": "so far"})

    def test_half_of_a_surrogate_pair_is_replaced(self) -> None:
        with serving(lambda path, payload: chat_reply("a\ud800b")) as served:
            assert texts(ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [1], [0])) == [["a?b"]]

    @pytest.mark.parametrize(
        "answer",
        [{}, {"choices": []}, {"choices": "a"}, {"choices": ["a"]}, {"choices": [{"text": 5}]}, {"choices": [{}]}],
    )
    def test_anything_else_is_told(self, answer: dict[str, Any]) -> None:
        with (
            serving(lambda path, payload: (200, answer)) as served,
            pytest.raises(UserError, match=r"/v1/completions: a.* without .*is it an OpenAI-compatible server\?"),
        ):
            ServerSource(served.url, "m", PARAMS).fill([row("p")], [1], [0])


class TestFailures:
    def test_an_overloaded_server_is_asked_again(self) -> None:
        replies = iter([error_reply(429, "slow down"), error_reply(500, "oh"), text_reply("a")])
        with serving(lambda path, payload: next(replies)) as served:
            assert texts(ServerSource(served.url, "m", PARAMS).fill([row("p")], [1], [0])) == [["a"]]
        assert len({str(payload) for payload in served.payloads}) == 1  # the same seed again

    def test_the_first_failure_ends_it_without_waiting_for_the_others(self) -> None:
        released = threading.Event()

        def reply(path: str, payload: dict[str, Any]) -> Reply:
            if payload["prompt"] == "bad":
                return error_reply(404, "no such model")
            released.wait(10)
            return text_reply("a")

        with serving(reply) as served:
            rows = [row("slow"), row("bad"), *(row(str(n)) for n in range(20))]
            before = set(threading.enumerate())
            with pytest.raises(UserError, match="no such model"):
                ServerSource(served.url, "m", PARAMS, workers=2).fill(rows, [1] * 22, [0] * 22)
            assert not released.is_set()
            released.set()
            deadline = time.monotonic() + 10
            while set(threading.enumerate()) - before and time.monotonic() < deadline:
                time.sleep(0.01)
        # The worker that met the failure may have taken one more before it was told to stop.
        assert len(served.requests) <= 3

    @pytest.mark.parametrize("status", [401, 404])
    def test_what_has_nothing_to_do_with_their_number_is_not_tried_one_by_one(self, status: int) -> None:
        with serving(lambda path, payload: error_reply(status, "no")) as served:
            with pytest.raises(UserError, match=f"HTTP status {status}"):
                ServerSource(served.url, "m", PARAMS).fill([row(MESSAGES)], [3], [0])
            assert len(served.requests) == 1

    def test_a_server_that_hangs_is_given_up(self) -> None:
        released = threading.Event()

        def reply(path: str, payload: dict[str, Any]) -> Reply:
            released.wait(10)
            return text_reply("late")

        with serving(reply) as served:
            source = ServerSource(served.url, "m", PARAMS, timeout=0.05, retries=1)
            with pytest.raises(UserError, match=r"no answer within 0\.05 s.*2 attempts"):
                source.fill([row("p")], [1], [0])
            released.set()

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://me:pw@host", "http://host?a=1"])
    def test_what_is_no_address_is_refused_at_once(self, url: str) -> None:
        with pytest.raises(UserError, match="write it as http://host:port/v1"):
            ServerSource(url, "m", PARAMS)
