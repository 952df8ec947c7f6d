"""Ollama's own client: lists, chat, streams, schemas, generate."""

import json
import os

from ollama import Client, ResponseError

client = Client(host=os.environ["GREENROOM_URL"])
model = client.list().models[0].model
options = {"num_predict": 24, "temperature": 0}
ask = {"model": model, "messages": [{"role": "user", "content": "hi"}]}

whole = client.chat(**ask, options=options)
assert whole.done
assert whole.eval_count <= 24
chunks = list(client.chat(**ask, options=options, stream=True))
assert "".join(c.message.content or "" for c in chunks) == whole.message.content
assert chunks[-1].done
schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
form = client.chat(**ask, format=schema, options={"num_predict": 200})
assert json.loads(form.message.content)["city"] in ("Oslo", "Rome")


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where
    """
    return city


client.chat(**ask, tools=[weather], options=options)
generated = client.generate(model=model, prompt="a", raw=True, options=options)
assert generated.eval_count <= 24
assert client.show(model).modelinfo["general.architecture"]
assert client.ps().models[0].model == model
vectors = client.embed(model=model, input=["a", "b"]).embeddings
assert len(vectors) == 2
assert abs(sum(value**2 for value in vectors[0]) - 1) < 1e-3
assert len(client.embeddings(model=model, prompt="a").embedding) == len(vectors[0])
refusal = None
try:
    client.chat(**ask, options={"mirostat": 2})
except ResponseError as error:
    refusal = error
assert "mirostat" in str(refusal)
print("ollama: fine")
