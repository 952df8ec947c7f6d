"""The event loop stays free, whatever is asked."""

import asyncio
import sys
import threading
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers
import uvicorn

from greenroom.server.body_reader import BodyReader
from greenroom.server.connection import Connection
from greenroom.server.errors import ApiError
from greenroom.server.large import large_json
from greenroom.server.stream import encode

from .heavy import CHAT, COMPLETIONS, HEAVY, USER, post, prepared, request

TURN = BaseEventLoop._run_once.__code__
CALLS = 30_000  # of functions between two turns: a few milliseconds
SIZE = 1 << 18  # characters or bytes handled in one call
CHANGES = {"encode", "decode", "replace", "translate", "split", "splitlines"}


class Work:
    """Notes, as a profile function, what would hold the loop up however fast the machine is.

    A thread can take the interpreter lock between two calls but not within one, so that a call
    for a large text counts in every thread, many small ones on the loop's thread only.

    Attributes:
        calls: most calls of functions between two turns of the loop.
        large: the largest text, or JSON on the loop, that was handled in one call.
        tokenised: the longest text that was tokenised in the loop's own thread.
    """

    def __init__(self) -> None:
        self.calls = self.large = self.tokenised = self._now = 0
        self._loop = threading.get_ident()

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "c_call":
            self._note(getattr(arg, "__self__", None), arg.__name__)
        if threading.get_ident() != self._loop or event not in ("call", "c_call"):
            return
        self._now = 0 if frame.f_code is TURN else self._now + 1
        self.calls = max(self.calls, self._now)
        name = frame.f_code.co_name
        if event == "c_call" and isinstance(getattr(arg, "__self__", None), tokenizers.Tokenizer):
            self.tokenised = max(self.tokenised, len(frame.f_locals["text"]))
        if event == "call" and name in ("model_validate_json", "loads"):
            given = frame.f_code.co_varnames[name == "model_validate_json"]
            self.large = max(self.large, len(frame.f_locals[given]))

    def _note(self, owner: Any, name: str) -> None:
        if isinstance(owner, str | bytes) and name in CHANGES:
            self.large = max(self.large, len(owner))

    def of(self, run: Callable[[], Any]) -> Any:
        """What `run` gives, noted."""
        sys.setprofile(self)
        try:
            return run()
        finally:
            sys.setprofile(None)


@pytest.fixture
def work() -> Iterator[Work]:
    found = Work()
    threading.setprofile(found)  # of threads that start from now on
    yield found
    threading.setprofile(None)


@pytest.mark.parametrize("name", HEAVY)
def test_nothing_holds_the_loop_up(work, make_client, engine, name):
    """The work between two turns is bounded; `tests/needs/loop.py` measures its time."""
    client = prepared(make_client, engine, name)
    path, raw = request(name)
    client.run(post(client.app, path, raw[:40_000]))
    status = work.of(lambda: client.run(post(client.app, path, raw)))
    assert status in (200, 400)
    assert 100 < work.calls < CALLS
    assert work.large <= SIZE
    assert work.tokenised <= len(engine.reply)  # which the fake engine does


def test_the_work_of_a_turn_is_noticed(client, work):
    async def much() -> None:
        for _ in range(CALLS):
            len("")

    work.of(lambda: client.run(much()))
    assert work.calls >= CALLS
    work.of(("x" * (SIZE + 1)).encode)
    assert work.large > SIZE


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": [5] * 300_000}, (300_000, 1 << 18)),
        ({"messages": [USER] * 4000, "tools": [{}] * 90_000}, (102_003, 1 << 16)),
    ],
)
def test_bodies_of_too_many_values_are_refused_with_both_numbers(client, body, numbers):
    response = client.post(COMPLETIONS if "prompt" in body else CHAT, body)
    assert response.status_code == 400
    for number in numbers:
        assert str(number) in response.json()["error"]["message"]


@pytest.mark.parametrize("padding", ["", " " * 40_000])
@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("messages[1].zz", '{"messages": [{"role": "user", "content": "x"}, {"zz": 1}]}'),
        ("messages[0].content", '{"messages": [{"role": "user", "content": 7}]}'),
        (None, '{"messages": [}'),
    ],
)
def test_large_bodies_are_told_what_is_wrong_as_small_ones_are(client, field, raw, padding):
    response = client.post(CHAT, content=(raw[:-1] + padding + raw[-1]).encode())
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(field or "the body is not JSON")


def test_a_body_that_ends_its_reader_is_refused_and_the_next_one_read(client):
    reader = BodyReader(seconds=0.2)
    try:
        hostile = b'{"prompt":[' + b"[[]]," * (1 << 20) + b"[]]}"
        with pytest.raises(ApiError, match="too much time or memory"):
            client.run(reader.read("CompletionRequest", hostile, (1 << 30, 1 << 30)))
        body = client.run(reader.read("CompletionRequest", b'{"prompt":"x"}', (9, 9)))
        assert body.prompt == "x"
    finally:
        reader.close()


def test_large_json_is_what_the_encoder_writes():
    value = {
        "a": [{"b": [0.1 * n for n in range(3000)]}] * 3,
        "c": [],
        "d": {},
        "e": [[1, 2], ["x"]],
        "f": [None, True, "é\u2028", {"g": {"h": {"i": {"j": [1, {"k": ()}]}}}}],
        3: "three",
        "long": '\u00e9"' * 100_000,
    }
    assert large_json(value) == encode(value)


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
)


async def connected(app: Any, sent: bytes) -> bytes:
    """What a real connection gives back."""
    config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(sent)
    found = await asyncio.wait_for(reader.read(100), 30)
    writer.close()
    server.close()
    return found


@pytest.mark.parametrize("chunk", [b"1\r\n \r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"])
def test_chunks_do_not_hold_the_loop_up(work, client, chunk):
    sent = HEAD + chunk * 50_000 if len(chunk) < 10 else HEAD + chunk * 500
    sent += b"0\r\n\r\n"
    answer = work.of(lambda: client.run(connected(client.app, sent)))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert 100 < work.calls < CALLS


def test_a_connection_without_a_request_is_closed(client, monkeypatch):
    monkeypatch.setattr(Connection, "silent_seconds", 0.3)
    assert client.run(connected(client.app, b"GET /health HTTP/1.1\r\nHost: loc")) == b""
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert client.run(connected(client.app, whole)).startswith(b"HTTP/1.1 200")
