"""Bodies of Greenroom's own routes; tokenize and detokenize follow vLLM's names."""

from typing import Annotated

from pydantic import Field

from greenroom.server.protocol.base import MAX_MESSAGES, MAX_TOOLS, Name, Several, Strict, TokenIds
from greenroom.server.protocol.openai import Message, Tool


class TokenizeRequest(Strict):
    """`POST /tokenize`: either a text or messages to render first."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[Several[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    tools: Annotated[Several[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: TokenIds | Annotated[Several[int], Field(max_length=0)]
