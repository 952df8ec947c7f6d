"""Cancellation, queues, errors in mid-stream, loading and unloading."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from greenroom.errors import ModelFileError
from greenroom.server import ServerSettings
from greenroom.server.registry import Registry
from greenroom.server.source import ModelSource

from .heavy import scope_of

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "x"}]}


async def ask(app: Any, body: Any, path: str = CHAT, leave_after: float | None = None) -> list[Any]:
    """One request straight through ASGI; the client leaves after so many seconds."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[Any] = []
    inbox = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Any:
        if inbox:
            return inbox.pop()
        await asyncio.sleep(1000 if leave_after is None else leave_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope_of(path), receive, send)
    return sent


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat", "/v1/completions"])
def test_client_that_leaves_cancels(client, engine, stream, n, path):
    engine.delay = 0.01
    engine.reply = "x" * 4000
    body = {"model": "fake", "stream": stream}
    body |= {"prompt": "x", "max_tokens": 4000} if path == "/v1/completions" else BODY
    body |= {"max_tokens": 4000} if path == "/v1/messages" else {}
    body |= {"n": n} if path.startswith("/v1/c") else {}
    client.run(ask(client.app, body, path, leave_after=0.05))
    assert engine.running == 0
    assert engine.cancelled == (n if path.startswith("/v1/c") else 1)
    (served,) = client.app.state.server.registry.loaded.values()
    assert (served.users, served._admitted) == (0, 0)


def test_client_that_leaves_before_the_stream_starts(make_client, engine):
    client = make_client(settings=ServerSettings(first_event_seconds=0.0))
    engine.delay = 10
    client.run(ask(client.app, {**BODY, "stream": True}, leave_after=0.0))
    (served,) = client.app.state.server.registry.loaded.values()
    assert (served.users, served._admitted, engine.running) == (0, 0, 0)


def test_full_queue_says_when_to_come_back(make_client, engine):
    client = make_client(settings=ServerSettings(queue=0))  # four sequences and no queue
    engine.delay = 0.02

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(ask(client.app, {**BODY, "n": 2}) for _ in range(3)))

    answers = sorted(client.run(crowd()), key=lambda sent: sent[0]["status"])
    assert [sent[0]["status"] for sent in answers] == [200, 200, 429]
    assert int(dict(answers[-1][0]["headers"])[b"retry-after"]) >= 1
    assert client.post(CHAT, BODY).status_code == 200
    assert client.post(CHAT, {**BODY, "n": 5}).status_code == 400  # never fits


def test_error_before_the_first_token_is_a_status(client, engine):
    engine.closed = True
    for path in (CHAT, "/v1/messages", "/api/chat"):
        body = {**BODY, "model": "fake", "stream": True}
        body |= {"max_tokens": 9} if path == "/v1/messages" else {}
        response = client.post(path, body)
        assert response.status_code == 503
        assert "closed" in response.text


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat", "/v1/responses"])
def test_error_in_mid_stream_is_the_last_event(client, engine, path):
    client.ok(CHAT, BODY)  # starts the template worker
    engine.delay, engine.yielded = 0.01, 0
    engine.reply = "x" * 4000

    async def close_soon() -> list[Any]:
        closing = asyncio.ensure_future(until(lambda: engine.yielded > 9))
        closing.add_done_callback(lambda _: engine.close())
        body: dict[str, Any] = {"model": "fake", "stream": True}
        body |= {"input": "x"} if path == "/v1/responses" else BODY
        body |= {"max_tokens": 4000} if path == "/v1/messages" else {}
        return await ask(client.app, body, path)

    sent = client.run(close_soon())
    assert sent[0]["status"] == 200
    data = b"".join(message.get("body", b"") for message in sent).decode()
    last = json.loads(data.strip().rpartition("\n")[2].removeprefix("data: "))
    assert "error" in last
    assert engine.running == 0


def test_silence_is_filled_with_pings(make_client, engine):
    client = make_client(settings=ServerSettings(ping_seconds=0.01))
    engine.delay = 0.05
    engine.reply = "ab"
    sent = client.run(ask(client.app, {**BODY, "stream": True}))
    assert any(message.get("body") == b": ping\n\n" for message in sent)


def test_models_load_on_first_use_and_leave_when_idle(make_client, make_engine, tmp_path):
    made: dict[str, Any] = {}

    def load(source: ModelSource) -> Any:
        if source.name == "bad":
            raise ModelFileError("bad.gguf: damaged; download it again")
        made[source.name] = make_engine()
        return made[source.name]

    sources = [ModelSource(name, tmp_path / f"{name}.gguf") for name in ("a", "b", "bad")]
    settings = ServerSettings(max_loaded=1, keep_alive=3600)
    client = make_client(lambda: Registry(sources, load, settings), settings)
    registry = client.app.state.server.registry
    assert not registry.loaded
    client.ok(CHAT, {**BODY, "model": "a"})
    assert list(registry.loaded) == ["a"]
    client.ok(CHAT, {**BODY, "model": "b"})  # takes the place of a
    assert list(registry.loaded) == ["b"]
    assert made["a"].closed
    assert 3500 < registry._timers["b"].when() - client.loop.time() <= 3600
    client.loop.call_soon(registry._expire, registry.loaded["b"])  # as the timer will
    client.run(until(lambda: not registry.loaded))
    assert made["b"].closed
    assert client.post(CHAT, BODY).status_code == 400  # which of them?
    response = client.post(CHAT, {**BODY, "model": "bad"})
    assert response.status_code == 500
    assert "bad.gguf" in response.json()["error"]["message"]
    client.ok("/api/generate", {"model": "a", "keep_alive": -1})
    assert (list(registry.loaded), list(registry._timers)) == (["a"], [])
    body = client.ok("/api/generate", {"model": "a", "keep_alive": 0})
    assert body["done_reason"] == "unload"
    client.run(until(lambda: not registry.loaded))


def test_a_model_in_use_is_not_unloaded(make_client, make_engine, tmp_path):
    def load(source: ModelSource) -> Any:
        engine = make_engine()
        engine.delay = 0.01
        return engine

    sources = [ModelSource(name, tmp_path / name) for name in ("a", "b")]
    settings = ServerSettings(max_loaded=1, keep_alive=0.0)
    client = make_client(lambda: Registry(sources, load, settings), settings)

    async def both() -> list[Any]:
        bodies = [{**BODY, "model": name} for name in ("a", "b", "a", "b")]
        return await asyncio.gather(*(ask(client.app, body) for body in bodies))

    assert [sent[0]["status"] for sent in client.run(both())] == [200] * 4


def test_a_client_that_leaves_within_its_body_is_no_error(client, caplog):
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80),
        "root_path": "",
    }
    inbox = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]
    sent = []

    async def receive() -> Any:
        return inbox.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    client.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert not caplog.records


def test_a_grammar_that_would_hold_up_everybody_is_refused(client):
    form = {"type": "regex", "pattern": "(a{999}){999}"}
    client.ok(CHAT, {**BODY, "response_format": {"type": "regex", "pattern": "[0-9]{1,900}"}})
    response = client.post(CHAT, {**BODY, "response_format": form})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("response_format")


def test_text_beyond_the_context_is_refused_before_it_is_tokenised(client, engine, monkeypatch):
    monkeypatch.setattr(type(engine.tokenizer), "encode", None)
    longest = max(map(len, engine.tokenizer.vocabulary.texts))
    text = "x" * (4 * longest * 4096 + 1)
    response = client.post("/v1/completions", {"prompt": text})
    assert response.status_code == 400
    assert str(len(text)) in response.json()["error"]["message"]
    assert "4096" in response.json()["error"]["message"]


def test_placement_and_metrics_show_the_prefix_store(client, engine, monkeypatch):
    store = {"budget": 100, "bytes": 64, "blocks": 2, "kept_blocks": 5, "restored_blocks": 3}
    plain = engine.stats()
    monkeypatch.setattr(engine, "stats", lambda: {**plain, "prefix_store": store})
    assert client.get("/placement").json()["prefix_store"] == store
    text = client.get("/metrics").text
    assert 'greenroom:prefix_store_bytes{model_name="fake"} 64.0' in text
    assert 'greenroom:prefix_store_restored_total{model_name="fake"} 3.0' in text
