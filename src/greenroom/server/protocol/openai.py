"""Bodies of OpenAI's chat completions, completions and embeddings."""

from typing import Annotated, Any, Literal

from pydantic import Field

from greenroom.server.protocol.base import (
    MAX_MESSAGES,
    MAX_TEXTS,
    MAX_TOOLS,
    Count,
    Effort,
    JsonObject,
    LogitBias,
    Name,
    Penalty,
    Probability,
    RepetitionPenalty,
    Seed,
    Several,
    Stop,
    Strict,
    Temperature,
    TokenIds,
    TopK,
    TopLogprobs,
)

Texts = Annotated[Several[str], Field(max_length=MAX_TEXTS)]
ListOfTokenIds = Annotated[Several[TokenIds], Field(max_length=MAX_TEXTS)]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Strict):
    name: Name
    arguments: str | JsonObject


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One message. Several APIs' extra keys for a model's reasoning are understood."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Several[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[Several[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[Several[Any], Field(max_length=0)] | None = None
    function_call: None = None


class FunctionDefinition(Strict):
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(Strict):
    name: str = "response"
    description: str | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """`text`, `json_object` and `json_schema` are OpenAI's; the others are ours."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark", "gbnf"]
    json_schema: JsonSchemaFormat | None = None
    pattern: str | None = Field(default=None, description="the expression, for type `regex`")
    grammar: str | None = Field(default=None, description="the text, for `lark` and `gbnf`")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Neutral(Strict):
    """Fields that change nothing here: they label or bill a request, or name a default."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(Strict):
    """The sampling fields that chat completions and completions share."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    ignore_eos: bool = False


class ChatCompletionRequest(Neutral, Sampling):
    """`POST /v1/chat/completions`."""

    model: Name | None = None
    messages: Annotated[Several[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count = 1
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[Several[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = Field(
        default=None, description="variables for the model's own chat template"
    )
    modalities: Several[Literal["text"]] | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`; prompts may be text or token ids."""

    model: Name | None = None
    prompt: str | TokenIds | Texts | ListOfTokenIds
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    n: Count = 1
    best_of: Count | None = Field(default=None, description="accepted when equal to `n`")
    echo: bool = False
    logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Literal[""] | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: bool = Field(default=True, description="begin the text with BOS")
    user: str | None = None


class EmbeddingsRequest(Strict):
    """`POST /v1/embeddings`; vectors are mean-pooled, normalised final hidden states."""

    model: Name | None = None
    input: str | TokenIds | Texts | ListOfTokenIds
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = Field(default=None, description="the model's own width only")
    user: str | None = None
