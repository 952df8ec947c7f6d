"""Anthropic's messages."""

import json

import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"name": "look", "input_schema": {"type": "object"}}
CALL = '<tool_call>{"name": "look", "arguments": {"x": "1"}}</tool_call>'
ASK = {"model": "fake", "max_tokens": 200, "messages": MESSAGES}


def test_blocks(client, engine):
    engine.reply = f"<think>hmm</think>Sure. {CALL}"
    body = client.ok("/v1/messages", {**ASK, "tools": [TOOL], "system": "be"})
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert body["content"][2]["input"] == {"x": "1"}
    assert body["stop_reason"] == "tool_use"
    usage = body["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(engine.prompts[0])
    assert "<|system|>be" in engine.prompt_text()


def test_stream_adds_up_to_the_message(client, engine):
    engine.reply = f"<think>hmm</think>Sure. {CALL}"
    events = client.events("/v1/messages", {**ASK, "tools": [TOOL], "stream": True})
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "hmm"
    assert "".join(d.get("text", "") for d in deltas) == "Sure."
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"x": "1"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] > 0


def test_events_are_named(client):
    text = client.post("/v1/messages", {**ASK, "stream": True}).text
    assert text.startswith('event: message_start\ndata: {"type":"message_start"')


def test_stop_sequence_is_told(client):
    body = client.ok("/v1/messages", {**ASK, "stop_sequences": ["xx", "wor"]})
    assert body["content"][0]["text"] == "Hello, "
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "wor")


def test_end_and_length(client):
    assert client.ok("/v1/messages", ASK)["stop_reason"] == "end_turn"
    assert client.ok("/v1/messages", {**ASK, "max_tokens": 2})["stop_reason"] == "max_tokens"


def test_history_with_tools(client, engine):
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "ok"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "bad", "is_error": True},
                {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    client.ok("/v1/messages", {**ASK, "messages": history, "tools": [TOOL]})
    text = engine.prompt_text()
    assert "<think>hm</think>ok<tool_call>" in text
    assert text.index("Error: bad") < text.index("go on")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"top_q": 1}, "top_q"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"temperature": 2}, "temperature"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ],
)
def test_errors_have_anthropics_shape(client, change, field):
    response = client.post("/v1/messages", {**ASK, **change})
    assert response.status_code == 400
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(field)


def test_thinking_sets_the_template(client, engine):
    client.ok("/v1/messages", {**ASK, "thinking": {"type": "enabled", "budget_tokens": 4096}})
    assert engine.prompt_text().endswith("<think>")
    client.ok("/v1/messages", {**ASK, "thinking": {"type": "disabled"}})
    assert not engine.prompt_text().endswith("<think>")


def test_tool_choice_any(client):
    body = client.ok("/v1/messages", {**ASK, "tools": [TOOL], "tool_choice": {"type": "any"}})
    assert body["content"][0]["name"] == "look"
    assert body["stop_reason"] == "tool_use"


def test_count_tokens(client, engine):
    counted = client.ok("/v1/messages/count_tokens", {"model": "fake", "messages": MESSAGES})
    client.ok("/v1/messages", ASK)
    assert counted == {"input_tokens": len(engine.prompts[-1])}
