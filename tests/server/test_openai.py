"""OpenAI's chat completions, completions, responses, embeddings and models."""

import base64
import json

import numpy as np
import pytest

MESSAGES = [{"role": "user", "content": "hi <|end|>"}]
CHAT = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {"x": {"type": "string"}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
CALL = '<tool_call>{"name": "look", "arguments": {"x": "1"}}</tool_call>'


def test_chat_answers_and_counts(client, engine):
    body = client.ok(CHAT, {"model": "fake", "messages": MESSAGES})
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Hello, world."
    assert choice["finish_reason"] == "stop"
    prompt = engine.prompts[-1]
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == len("Hello, world.") + 1
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    # What the user wrote is text, not the control token of that name.
    assert prompt.count(257) == 1


def test_stream_is_the_same_answer_with_usage_last(client):
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    events = client.events(CHAT, body)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == "Hello, world."
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 14
    assert len({e["id"] for e in events}) == 1


def test_stream_without_usage_ends_with_done(client):
    response = client.post(CHAT, {"messages": MESSAGES, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")
    assert "usage" not in response.text


def test_n_choices_have_seeds_of_their_own(client, engine):
    body = client.ok(CHAT, {"messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 2})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(params.seed for params in engine.params) == [7, 8, 9]
    assert body["usage"]["prompt_tokens"] == len(engine.prompts[0])
    assert body["usage"]["completion_tokens"] == 6
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}


def test_sampling_fields_reach_the_engine(client, engine):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 3}
    penalties = {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1}
    client.ok(CHAT, {"messages": MESSAGES, "logit_bias": {"5": -100}, **fields, **penalties})
    params = engine.params[-1]
    for name, value in {**fields, **penalties, "top_k": 0}.items():
        assert getattr(params, name) == value
    assert dict(params.logit_bias) == {5: -100}


@pytest.mark.parametrize("stop", ["wor", ["zzz", "wor"]])
def test_stop_string_never_shows(client, stop):
    body = client.ok(CHAT, {"messages": MESSAGES, "stop": stop})
    assert body["choices"][0]["message"]["content"] == "Hello, "
    assert body["choices"][0]["finish_reason"] == "stop"


def test_reasoning_and_tool_calls_are_split_off(client, engine):
    engine.reply = f"<think>hmm</think>Sure. {CALL}"
    message = client.ok(CHAT, {"messages": MESSAGES, "tools": [TOOL]})["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    assert message["message"]["reasoning_content"] == "hmm"
    assert message["message"]["content"] == "Sure."
    (call,) = message["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"x": "1"}
    assert '"name": "look"' in engine.prompt_text()


def test_streamed_tool_call_has_id_and_name_first(client, engine):
    engine.reply = CALL
    events = client.events(CHAT, {"messages": MESSAGES, "tools": [TOOL], "stream": True})
    calls = [
        call for e in events for call in e["choices"][0]["delta"].get("tool_calls", ())
    ]  # fmt: skip
    assert calls[0]["id"].startswith("call_")
    assert calls[0]["function"]["name"] == "look"
    assert all("id" not in call for call in calls[1:])
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"x": "1"}


def test_one_tool_call_if_not_parallel(client, engine):
    engine.reply = CALL + CALL
    body = {"messages": MESSAGES, "tools": [TOOL]}
    two = client.ok(CHAT, body)["choices"][0]["message"]["tool_calls"]
    one = client.ok(CHAT, {**body, "parallel_tool_calls": False})["choices"][0]["message"]
    assert (len(two), len(one["tool_calls"])) == (2, 1)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "look"}}]
)  # fmt: skip
def test_demanded_tool_is_called(client, choice):
    body = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}
    found = client.ok(CHAT, body)["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    function = found["message"]["tool_calls"][0]["function"]
    assert function["name"] == "look"
    assert isinstance(json.loads(function["arguments"])["x"], str)


def test_tool_choice_none_hides_the_tools(client, engine):
    client.ok(CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"})
    assert "look" not in engine.prompt_text()


def test_tool_turn_is_rendered(client, engine):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "look", "arguments": '{"x": "1"}'}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "found"}]},
    ]
    client.ok(CHAT, {"messages": history, "tools": [TOOL]})
    assert "found" in engine.prompt_text()
    assert '"x": "1"' in engine.prompt_text()


def test_json_schema_holds_after_reasoning(client, engine):
    engine.reply = "<think>well</think>no json at all"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    message = client.ok(CHAT, {"messages": MESSAGES, "response_format": form})
    message = message["choices"][0]["message"]
    assert message["reasoning_content"] == "well"
    assert isinstance(json.loads(message["content"])["a"], int)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "regex", "pattern": "ab{1,3}c"}, "abc"),
        ({"type": "lark", "grammar": 'start: "yes"'}, "yes"),
        ({"type": "gbnf", "grammar": 'root ::= "no"'}, "no"),
        ({"type": "text"}, "Hello, world."),
    ],
)
def test_other_forms(client, form, expected):
    body = client.ok("/v1/completions", {"prompt": "x", "response_format": form, "max_tokens": 99})
    assert body["choices"][0]["text"].startswith(expected[:2])
    assert body["choices"][0]["text"][-1] == expected[-1]


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"type": "regex", "pattern": "a("}, "response_format.pattern"),
        ({"type": "regex"}, "response_format.pattern"),
        ({"type": "json_schema"}, "response_format"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "bogus"}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_wrong_form_is_named(client, form, field):
    response = client.post(CHAT, {"messages": MESSAGES, "response_format": form})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_logprobs_of_content_only(client, engine):
    engine.reply = "<think>a</think>bc"
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    content = client.ok(CHAT, body)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["b", "c"]
    assert content[0]["bytes"] == [98]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["b", "x"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"foo": 1}, "foo"),
        ({"store": True}, "store"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"functions": []}, "functions"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop": [""]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"max_tokens": 100_000}, "messages"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_not_supported_is_named(client, change, field):
    response = client.post(CHAT, {"messages": MESSAGES, **change})
    assert response.status_code == (404 if "model" in change else 400), response.text
    assert response.json()["error"]["param"] == field


def test_neutral_fields_are_accepted(client):
    neutral = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    client.ok(CHAT, {"messages": MESSAGES, **neutral})


def test_too_long_prompt_tells_both_numbers(client):
    response = client.post(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]})
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    assert "5008" in error["message"] or "500" in error["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"messages": NaN}', b"\xff", b"[" * 99999])
def test_broken_bodies_are_refused(client, raw):
    response = client.post(CHAT, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_completion_with_echo_and_logprobs(client):
    body = {"prompt": [104, 105], "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = client.ok("/v1/completions", body)["choices"][0]
    assert choice["text"] == "hiH"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "H"]
    assert logprobs["token_logprobs"] == [None, -1.0, -0.5]
    assert logprobs["top_logprobs"] == [None, {"i": -1.0}, {"H": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2]


def test_bytes_that_are_no_text_have_names(client):
    body = {"prompt": [0xC3, 0xA9], "echo": True, "logprobs": 0, "max_tokens": 1}
    tokens = client.ok("/v1/completions", body)["choices"][0]["logprobs"]["tokens"]
    assert tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_completion_of_the_prompt_only(client):
    body = {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0}
    found = client.ok("/v1/completions", body)
    assert found["choices"][0]["text"] == "<|begin|>hi"
    assert len(found["choices"][0]["logprobs"]["tokens"]) == 3
    assert found["usage"]["completion_tokens"] == 0


def test_several_prompts_and_choices_keep_their_order(client, engine):
    body = {"prompt": ["a", "bb"], "n": 2, "max_tokens": 1, "echo": True}
    texts = [c["text"] for c in client.ok("/v1/completions", body)["choices"]]
    assert texts == ["<|begin|>aH"] * 2 + ["<|begin|>bbH"] * 2


def test_streamed_completion(client):
    events = client.events("/v1/completions", {"prompt": "a", "stream": True, "logprobs": 1})
    assert "".join(e["choices"][0]["text"] for e in events) == "Hello, world."
    offsets = [o for e in events for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [*range(13), 13]


@pytest.mark.parametrize("change", [{"best_of": 3}, {"suffix": "x"}, {"max_tokens": 0}])
def test_completion_fields_that_are_not_supported(client, change):
    response = client.post("/v1/completions", {"prompt": "a", **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(change))


def test_response_has_reasoning_message_and_call(client, engine):
    engine.reply = f"<think>hmm</think>Sure. {CALL}"
    tool = {"type": "function", "name": "look", "parameters": PARAMETERS}
    body = client.ok("/v1/responses", {"input": "hi", "instructions": "be", "tools": [tool]})
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert body["output"][1]["content"][0]["text"] == "Sure."
    assert json.loads(body["output"][2]["arguments"]) == {"x": "1"}
    assert body["status"] == "completed"
    assert body["store"] is False
    assert "<|system|>be<|end|>" in engine.prompt_text()


def test_streamed_response_has_numbered_events(client):
    events = client.events("/v1/responses", {"input": "hi", "stream": True})
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"] for e in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    final = events[-1]
    assert final["type"] == "response.completed"
    assert final["response"]["output"][0]["content"][0]["text"] == deltas == "Hello, world."
    assert final["response"]["usage"]["output_tokens"] == 14


def test_response_conversation_comes_back_as_input(client, engine):
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "found"},
    ]
    client.ok("/v1/responses", {"input": history})
    assert "<think>r</think><tool_call>" in engine.prompt_text()
    assert "found" in engine.prompt_text()


def test_cut_response_is_incomplete(client):
    body = client.ok("/v1/responses", {"input": "hi", "max_output_tokens": 2})
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    "change", [{"store": True}, {"previous_response_id": "r"}, {"background": True}]
)
def test_stateful_responses_are_refused(client, change):
    response = client.post("/v1/responses", {"input": "hi", **change})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(change))


def test_embeddings_are_unit_vectors(client):
    plain = client.ok("/v1/embeddings", {"input": ["a", "bc"]})
    vectors = np.array([d["embedding"] for d in plain["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    packed = client.ok("/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    raw = base64.b64decode(packed["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), vectors[0], atol=1e-6)
    assert plain["usage"]["prompt_tokens"] == 5  # with BOS


def test_models(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert client.get("/v1/models/fake").json()["object"] == "model"
    assert client.get("/v1/models/none").status_code == 404
