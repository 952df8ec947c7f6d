"""Anthropic's own client: messages, streams, tools, count of tokens."""

import os

from anthropic import Anthropic, BadRequestError

client = Anthropic(base_url=os.environ["GREENROOM_URL"], api_key="none")
model = os.environ["GREENROOM_MODEL"]
ask = {"model": model, "max_tokens": 24, "messages": [{"role": "user", "content": "hi"}]}
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"name": "weather", "description": "d", "input_schema": schema}

message = client.messages.create(**ask, extra_body={"temperature": 0.5})
assert message.stop_reason in ("end_turn", "max_tokens")
counted = client.messages.count_tokens(model=model, messages=ask["messages"])
usage = message.usage
assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
with client.messages.stream(**ask) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == "".join(block.text for block in final.content if block.type == "text")
assert final.usage.output_tokens <= 24

ask["max_tokens"] = 200
forced = {"tools": [tool], "tool_choice": {"type": "any"}}
called = client.messages.create(**ask, **forced)
(use,) = called.content
assert use.input["city"] in ("Oslo", "Rome")
assert called.stop_reason == "tool_use"
with client.messages.stream(**ask, **forced) as stream:
    assert stream.get_final_message().content[0].input["city"]
result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
history = [
    *ask["messages"],
    {"role": "assistant", "content": [use.model_dump(exclude_none=True)]},
    {"role": "user", "content": [result]},
]
client.messages.create(model=model, max_tokens=8, messages=history, tools=[tool])
refusal = None
try:
    client.messages.create(**ask, extra_body={"nonsense": 1})
except BadRequestError as error:
    refusal = error
assert "nonsense" in str(refusal)
print("anthropic: fine")
