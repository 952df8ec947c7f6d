"""OpenAI's own client: models, chat, streams, tools, schemas, completions, responses, vectors."""

import json
import os

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=os.environ["GREENROOM_URL"] + "/v1", api_key="none")
model = client.models.list().data[0].id
ask = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
parameters = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}

whole = client.chat.completions.create(**ask, temperature=0, logprobs=True, top_logprobs=2)
assert whole.usage.completion_tokens <= 24
assert whole.choices[0].logprobs is not None
stream = client.chat.completions.create(
    **ask, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == (whole.choices[0].message.content or ""), (text, whole)
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

ask["max_tokens"] = 200
called = client.chat.completions.create(**ask, tools=[tool], tool_choice="required")
(call,) = called.choices[0].message.tool_calls
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
history = [*ask["messages"], called.choices[0].message.model_dump(exclude_none=True)]
history.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
client.chat.completions.create(model=model, messages=history, tools=[tool], max_tokens=8)

names = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
pieces = [
    piece
    for chunk in client.chat.completions.create(**ask, **names, stream=True)
    for piece in (chunk.choices[0].delta.tool_calls or ())
]
assert pieces[0].function.name == "weather"
assert json.loads("".join(p.function.arguments or "" for p in pieces))["city"]

form = {"type": "json_schema", "json_schema": {"name": "w", "schema": parameters}}
answer = client.chat.completions.create(**ask, response_format=form)
assert json.loads(answer.choices[0].message.content)["city"]

completion = client.completions.create(model=model, prompt="a b", max_tokens=4, n=2, seed=1)
assert len(completion.choices) == 2
flat = {"type": "function", "name": "weather", "parameters": parameters}
response = client.responses.create(
    model=model, input="hi", max_output_tokens=200, tools=[flat], tool_choice="required"
)
assert response.output[0].type == "function_call"
with client.responses.stream(model=model, input="hi", max_output_tokens=12) as events:
    seen = list(events)
assert seen[0].type == "response.created"
last = seen[-1]
assert last.type in ("response.completed", "response.incomplete")
assert last.response.usage.output_tokens <= 12
assert len(client.embeddings.create(model=model, input=["a", "b"]).data) == 2
refusal = None
try:
    client.chat.completions.create(**ask, extra_body={"nonsense": 1})
except BadRequestError as error:
    refusal = error
assert refusal.param == "nonsense"
print("openai: fine")
