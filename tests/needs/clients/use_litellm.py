"""litellm, by OpenAI's, Anthropic's and Ollama's routes."""

import json
import os

import litellm

url, model = os.environ["GREENROOM_URL"], os.environ["GREENROOM_MODEL"]
ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
routes = (
    {"model": f"openai/{model}", "api_base": url + "/v1", "api_key": "none"},
    {"model": f"anthropic/{model}", "api_base": url, "api_key": "none"},
    {"model": f"ollama_chat/{model}", "api_base": url},
)
for route in routes:
    whole = litellm.completion(**route, **ask)
    assert whole.usage.completion_tokens <= 12, route
    chunks = list(litellm.completion(**route, **ask, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length"), route
parameters = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
ask |= {"max_tokens": 200, "tools": [tool], "tool_choice": "required"}
for route in routes[:2]:  # Ollama's API cannot demand a tool
    whole = litellm.completion(**route, **ask)
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**route, **ask, stream=True)))
    for answer in (whole, streamed):
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather", route
        assert isinstance(json.loads(call.function.arguments)["sunny"], bool), route
print("litellm: fine")
