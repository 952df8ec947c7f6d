"""The event loop stays free, whatever is asked."""

import asyncio
import gc
import json
import time
from typing import Any

import pytest
import uvicorn

from greenroom.server import Caps, ServerSettings
from greenroom.server.body_reader import BodyReader
from greenroom.server.connection import Connection
from greenroom.server.errors import ApiError
from greenroom.server.large import large_json
from greenroom.server.stream import encode

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}
BODY = {"messages": [USER]}
TEXT = 7 << 20  # bytes; a body may have 8 MiB
SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def said(text: str) -> Any:
    return CHAT, {"messages": [{"role": "user", "content": text}]}


def listed(item: bytes, field: bytes = b"prompt") -> Any:
    path = COMPLETIONS if field == b"prompt" else CHAT
    items = b",".join([item] * (TEXT // (len(item) + 1)))
    return path, b'{"%s":[%s]}' % (field, items)


HEAVY: dict[str, tuple[str, Any]] = {
    "a chat": said("word " * 700),
    "text of words": said("word " * (TEXT // 5)),
    "text of marks": said("<|<|" * (TEXT // 4)),
    "text of spaces": said(" " * TEXT),
    "text that is not ASCII": said("永和九年" * (TEXT // 12)),
    "text to complete": (COMPLETIONS, {"prompt": "word " * (TEXT // 5)}),
    "schema": (CHAT, BODY | {"max_tokens": 3, "response_format": FORM}),
    "tools": (CHAT, BODY | {"tools": [TOOL] * 20}),
    "demanded tools": (CHAT, BODY | {"tools": [TOOL] * 20, "tool_choice": "required", "n": 4}),
    "as many messages as may be": (CHAT, {"messages": [USER] * 4096}),
    "more messages": (CHAT, {"messages": [USER] * 20_000}),
    "wrong messages": (CHAT, {"messages": [{"role": "user", "zz": 1}] * 20_000}),
    "messages of parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 20_000}]},
    ),
    "more parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 60_000}]},
    ),
    "empty messages": listed(b"{}", b"messages"),
    "token ids": (COMPLETIONS, {"prompt": [5] * 100_000}),
    "ids without end": listed(b"5"),
    "wrong ids": listed(b"1.5"),
    "empty lists": listed(b"[]"),
    "nested lists": (COMPLETIONS, b'{"prompt":' + b"[" * TEXT),
    "unknown fields": (CHAT, BODY | {f"a{i}": 1 for i in range(300_000)}),
    "a small body of wrong parts": (
        CHAT,
        b'{"messages":[{"role":"user","content":[%s]}]}' % b",".join([b"{}"] * 10_000),
    ),
    "scored prompt": (
        COMPLETIONS,
        {"prompt": "word " * 700, "max_tokens": 1, "echo": True, "logprobs": 5},
    ),
    "tokenize": ("/tokenize", {"prompt": "word " * 20_000, "return_token_strs": True}),
    "text to tokenize": ("/tokenize", {"prompt": "word " * (TEXT // 5)}),
    "detokenize": ("/detokenize", {"tokens": [65] * 100_000}),
    "embeddings": ("/v1/embeddings", {"input": ["x"] * 256}),
}


async def post(app: Any, path: str, raw: bytes) -> int:
    """The status of the answer."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80),
        "root_path": "",
    }
    status: list[int] = []
    parts = [raw[at : at + 65536] for at in range(0, len(raw), 65536)]

    async def receive() -> Any:
        if not parts:
            await asyncio.sleep(1000)
        body = parts.pop(0)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        status.append(message.get("status", 0))

    await app(scope, receive, send)
    return status[0]


async def longest_pause(work: Any) -> tuple[Any, float]:
    """What `work` gives, and the longest time in which the loop did not come round, in seconds
    of the process's own processor time.

    All threads' time is in it: a call in a thread that keeps the interpreter lock holds the loop
    up as one on the loop does. What other processes take is not.
    """
    longest, last = 0.0, time.process_time()

    async def beat() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.001)
            now = time.process_time()
            longest, last = max(longest, now - last), now

    beating = asyncio.ensure_future(beat())
    result = await work
    await asyncio.sleep(0.005)
    beating.cancel()
    return result, longest


@pytest.mark.parametrize("name", HEAVY)
def test_nothing_holds_the_loop_up(make_client, engine, name):
    """Never 20 ms. The least of three counts, since a garbage collection may fall anywhere."""
    client = make_client(settings=ServerSettings(caps=Caps(compile_seconds=60)))
    engine.width = 2880
    if "text" in name:  # else it is seen at once that they cannot fit
        engine.config.context_length = 1 << 18
    path, body = HEAVY[name]
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    small = BODY | {"max_tokens": 1, "response_format": {"type": "json_object"}}
    client.run(post(client.app, CHAT, json.dumps(small).encode()))  # starts the workers
    client.run(post(client.app, path, raw[:40_000]))
    gc.collect()
    gc.freeze()  # as `launch.run` does
    found = []
    for _ in range(3):
        status, longest = client.run(longest_pause(post(client.app, path, raw)))
        assert status in (200, 400)
        found.append(round(longest, 4))
        if longest < 0.02:
            break
    gc.unfreeze()
    assert min(found) < 0.02, found


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
def test_chunks_do_not_hold_the_loop_up(client, chunk):
    sent = HEAD + chunk * 50_000 if len(chunk) < 10 else HEAD + chunk * 500
    sent += b"0\r\n\r\n"
    found = []
    for _ in range(3):
        answer, longest = client.run(longest_pause(connected(client.app, sent)))
        assert answer.startswith(b"HTTP/1.1 400 ")
        found.append(longest)
    assert min(found) < 0.02, found


def test_a_connection_without_a_request_is_closed(client, monkeypatch):
    monkeypatch.setattr(Connection, "silent_seconds", 0.05)
    assert client.run(connected(client.app, b"GET /health HTTP/1.1\r\nHost: loc")) == b""
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert client.run(connected(client.app, whole)).startswith(b"HTTP/1.1 200")
