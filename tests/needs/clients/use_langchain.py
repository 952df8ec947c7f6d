"""langchain-openai: invoke, stream, tools, structured output, embeddings."""

import os

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

url, model = os.environ["GREENROOM_URL"] + "/v1", os.environ["GREENROOM_MODEL"]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=200, temperature=0.5)


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")  # else a random model never ends
    sunny: bool


assert chat.invoke("hi").usage_metadata["output_tokens"] <= 200
assert list(chat.stream("hi"))
bound = chat.bind_tools([Weather], tool_choice="required")
assert isinstance(bound.invoke("hi").tool_calls[0]["args"]["sunny"], bool)
streamed = [piece for piece in bound.stream("hi") if piece.tool_call_chunks]
assert streamed[0].tool_call_chunks[0]["name"] == "Weather"
structured = chat.with_structured_output(Weather, method="json_schema")
assert isinstance(structured.invoke("hi"), Weather)
vectors = OpenAIEmbeddings(
    base_url=url, api_key="none", model=model, check_embedding_ctx_length=False
)
assert len(vectors.embed_documents(["a", "b"])) == 2
print("langchain-openai: fine")
