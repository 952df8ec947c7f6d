"""Bodies of Anthropic's messages API."""

from typing import Annotated, Any, Literal

from pydantic import Field

from greenroom.server.protocol.base import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    Count,
    JsonObject,
    Name,
    Probability,
    Several,
    StopString,
    Strict,
    TopK,
)


class CacheControl(Strict):
    """Prefixes are cached without being asked: the mark changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Several[Any], Field(max_length=0)] | None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: Name
    input: JsonObject
    cache_control: CacheControl | None = None
    caller: JsonObject | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Several[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | Several[Block]


class Tool(Strict):
    name: Name
    description: str | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = Field(
        default=None, description="sets the effort: under 2048 low, under 8192 medium, else high"
    )
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    user_id: str | None = None


class CountTokensRequest(Strict):
    """`POST /v1/messages/count_tokens`."""

    model: Name | None = None
    messages: Annotated[Several[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Several[TextBlock] | None = None
    tools: Annotated[Several[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: Count
    stream: bool | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    stop_sequences: Annotated[Several[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
