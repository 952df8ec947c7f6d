"""Ollama's API."""

import pytest

from greenroom.server.routes.ollama import seconds_of

MESSAGES = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>{"name": "look", "arguments": {"x": "1"}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHAT = {"model": "fake", "messages": MESSAGES}


def test_chat_streams_lines(client):
    lines = client.lines("/api/chat", CHAT)
    assert "".join(line["message"]["content"] for line in lines) == "Hello, world."
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    last = lines[-1]
    assert last["eval_count"] == 14
    assert last["done_reason"] == "stop"
    assert last["total_duration"] >= last["prompt_eval_duration"] > 0


def test_chat_whole_with_thinking_and_tools(client, engine):
    engine.reply = f"hmm</think>{CALL}"  # the template opens the reasoning
    body = client.ok("/api/chat", {**CHAT, "stream": False, "tools": [TOOL], "think": True})
    assert body["message"]["thinking"] == "hmm"
    assert body["message"]["tool_calls"][0]["function"]["arguments"] == {"x": "1"}
    engine.reply = "<think>hmm</think>x"
    quiet = client.ok("/api/chat", {**CHAT, "stream": False, "think": False})
    assert "thinking" not in quiet["message"]


def test_streamed_tool_call_is_complete(client, engine):
    engine.reply = CALL
    lines = client.lines("/api/chat", {**CHAT, "tools": [TOOL]})
    (calls,) = [line["message"]["tool_calls"] for line in lines if "tool_calls" in line["message"]]
    assert calls[0]["function"]["name"] == "look"


def test_generate(client, engine):
    body = client.ok("/api/generate", {"model": "fake", "prompt": "x", "stream": False})
    assert body["response"] == "Hello, world."
    assert engine.prompt_text() == "<|begin|><|user|>x<|end|><|assistant|>"
    raw = {"model": "fake", "prompt": "x", "stream": False, "raw": True}
    client.ok("/api/generate", raw)
    assert engine.prompt_text() == "x"


def test_options_reach_the_engine(client, engine):
    options = {"num_predict": 3, "top_k": 5, "repeat_penalty": 1.2, "stop": ["x"], "seed": 1}
    body = client.ok("/api/chat", {**CHAT, "stream": False, "options": options})
    params = engine.params[-1]
    assert (params.max_tokens, params.top_k, params.repetition_penalty) == (3, 5, 1.2)
    assert body["done_reason"] == "length"


def test_lower_context_holds(client):
    body = {**CHAT, "stream": False, "options": {"num_ctx": 12}}
    found = client.ok("/api/chat", body)
    assert found["prompt_eval_count"] + found["eval_count"] == 12
    assert client.post("/api/chat", {**body, "options": {"num_ctx": 5}}).status_code == 400
    response = client.post("/api/chat", {**body, "options": {"num_ctx": 9999}})
    assert "9999" in response.json()["error"]
    assert "4096" in response.json()["error"]


def test_format(client, engine):
    body = client.ok("/api/chat", {**CHAT, "stream": False, "format": "json"})
    assert body["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"num_gpu": 2}}, "options.num_gpu"),
        ({"template": "x"}, "template"),
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_errors_have_ollamas_shape(client, change, field):
    response = client.post("/api/chat", {**CHAT, **change})
    assert response.status_code == 400
    assert response.json()["error"].startswith(field)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("1h30m", 5400), ("-1", -1), (10, 10), ("250ms", 0.25)]
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


def test_listings(client):
    assert client.get("/api/tags").json()["models"][0]["name"] == "fake"
    running = client.get("/api/ps").json()["models"][0]
    assert running["size"] == 1600
    assert client.ok("/api/show", {"model": "fake"})["details"]["family"] == "fake"
    assert client.ok("/api/show", {"name": "fake:latest"})["capabilities"]
    assert client.get("/api/version").json()["version"]


def test_empty_chat_loads(client):
    body = client.ok("/api/chat", {"model": "fake", "messages": []})
    assert (body["done"], body["done_reason"]) == (True, "load")


def test_embed_gives_unit_vectors_of_all_texts(client):
    body = client.ok("/api/embed", {"model": "fake", "input": ["hi", "hello"]})
    assert [len(vector) for vector in body["embeddings"]] == [3, 3]
    for vector in body["embeddings"]:
        assert sum(value**2 for value in vector) == pytest.approx(1, abs=1e-6)
    assert body["prompt_eval_count"] == 9  # each text begins with BOS
    assert body["total_duration"] >= body["load_duration"] >= 0
    one = client.ok("/api/embed", {"model": "fake", "input": "hi", "keep_alive": "5m"})
    assert one["embeddings"] == body["embeddings"][:1]
    assert client.ok("/api/embed", {"model": "fake", "input": []})["embeddings"] == []


def test_older_embeddings_are_not_scaled(client):
    body = client.ok("/api/embeddings", {"model": "fake", "prompt": "hi"})
    assert body["embedding"] == [3.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/embed", {"input": "x" * 5000}, "input"),
        ("/api/embed", {"input": "x", "truncate": True}, "truncate"),
        ("/api/embed", {"input": "x", "dimensions": 5}, "dimensions"),
        ("/api/embed", {"input": ["x"] * 300}, "input"),
        ("/api/embeddings", {"prompt": "x", "options": {}}, "options"),
        ("/api/embeddings", {"prompt": "x", "keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_embeddings_refuse_by_name(client, path, body, field):
    response = client.post(path, {"model": "fake", **body})
    assert response.status_code == 400
    assert response.json()["error"].startswith(field)
