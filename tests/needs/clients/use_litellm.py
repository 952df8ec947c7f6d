"""litellm, by OpenAI's, Anthropic's and Ollama's routes."""

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
print("litellm: fine")
