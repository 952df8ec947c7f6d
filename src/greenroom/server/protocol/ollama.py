"""Bodies of Ollama's API. Options that only a reload could honour are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import Field

from greenroom.server.protocol.base import (
    MAX_MESSAGES,
    MAX_TEXTS,
    MAX_TOOLS,
    Count,
    JsonObject,
    Name,
    Penalty,
    Probability,
    RepetitionPenalty,
    Seed,
    Several,
    Stop,
    Strict,
    Temperature,
    TopK,
    TopLogprobs,
)
from greenroom.server.protocol.openai import Tool


class Options(Strict):
    """Sampling options; `num_ctx` may lower the context of one request, not raise it."""

    num_ctx: Count | None = None
    num_predict: Annotated[int, Field(ge=-2, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Stop | None = None


class CalledFunction(Strict):
    name: Name
    arguments: JsonObject
    index: int | None = None


class ToolCall(Strict):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[Several[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[Several[Any], Field(max_length=0)] | None = None


class Generation(Strict):
    """What chat and generate share."""

    model: Name
    stream: bool | None = None
    format: Literal["", "json"] | JsonObject | None = None
    options: Options | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    truncate: Literal[False] | None = None
    shift: Literal[False] | None = None


class ChatRequest(Generation):
    """`POST /api/chat`."""

    messages: Annotated[Several[Message], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[Several[Tool], Field(max_length=MAX_TOOLS)] | None = None


class GenerateRequest(Generation):
    """`POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    images: Annotated[Several[Any], Field(max_length=0)] | None = None


class EmbedRequest(Strict):
    """`POST /api/embed`; a text that is too long is refused, never cut."""

    model: Name
    input: str | Annotated[Several[str], Field(max_length=MAX_TEXTS)]
    truncate: Literal[False] | None = None
    dimensions: Count | None = Field(default=None, description="the model's own width only")
    keep_alive: float | str | None = None


class EmbeddingRequest(Strict):
    """`POST /api/embeddings`, the older form for one text."""

    model: Name
    prompt: str
    keep_alive: float | str | None = None


class ShowRequest(Strict):
    """`POST /api/show`; older clients say `name`."""

    model: Name | None = None
    name: Name | None = None
    verbose: bool | None = None
