"""Request bodies: read, checked against their model, described in the OpenAPI document."""

import asyncio
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request

from greenroom.server.errors import validation_error
from greenroom.server.protocol import anthropic, local, ollama, openai, responses
from greenroom.server.protocol.base import Strict
from greenroom.server.stream import ClientGoneError

B = TypeVar("B", bound=Strict)
REQUESTS: tuple[type[Strict], ...] = (
    openai.ChatCompletionRequest,
    openai.CompletionRequest,
    openai.EmbeddingsRequest,
    responses.ResponsesRequest,
    anthropic.MessagesRequest,
    anthropic.CountTokensRequest,
    ollama.ChatRequest,
    ollama.GenerateRequest,
    ollama.EmbedRequest,
    ollama.EmbeddingRequest,
    ollama.ShowRequest,
    local.TokenizeRequest,
    local.DetokenizeRequest,
)

_LARGE = 1 << 16  # bytes; larger ones are read in a thread


async def read(request: Request, model: type[B]) -> B:
    """The request's body.

    Raises:
        ApiError: 400 naming the field that is wrong or not supported.
        ClientGoneError: the client left before the body was complete.
    """
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ClientGoneError from None
    try:
        if len(raw) <= _LARGE:
            return model.model_validate_json(raw)
        return await asyncio.to_thread(model.model_validate_json, raw)
    except ValidationError as error:
        raise validation_error(error, _loaded(raw) if len(raw) <= _LARGE else None) from None


def _loaded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def takes(model: type[Strict]) -> dict[str, Any]:
    """The part of a route's OpenAPI entry that says which body it takes."""
    reference = {"$ref": f"#/components/schemas/{_names()[model]}"}
    content = {"application/json": {"schema": reference}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _names() -> dict[type[Strict], str]:
    counts: dict[str, int] = {}
    for model in REQUESTS:
        counts[model.__name__] = counts.get(model.__name__, 0) + 1
    assert max(counts.values()) == 1, counts
    return {model: model.__name__ for model in REQUESTS}


def component_schemas() -> dict[str, Any]:
    """The schemas of all bodies, for `components.schemas` of the OpenAPI document."""
    pairs = [(model, "validation") for model in REQUESTS]
    _, document = models_json_schema(
        pairs,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    return dict(document["$defs"])
