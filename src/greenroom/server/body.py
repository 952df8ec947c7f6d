"""Request bodies: read, checked against their model, described in the OpenAPI document.

Large ones are read in a process of their own and worked on in threads: neither may hold up the
event loop.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect, Request

from greenroom.server.body_models import REQUESTS
from greenroom.server.body_reader import shared_reader
from greenroom.server.errors import validation_error
from greenroom.server.protocol.base import Strict
from greenroom.server.stream import ClientGoneError

B = TypeVar("B", bound=Strict)
T = TypeVar("T")
_LARGE = 1 << 15  # bytes; a smaller one is read within a few milliseconds, right or wrong


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
    if len(raw) > _LARGE:
        caps = request.app.state.server.settings.caps
        limits = (caps.values, caps.numbers)
        found: B = await shared_reader().read(model.__name__, raw, limits)
        return found
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise validation_error(error, _loaded(raw)) from None


async def apart(request: Request, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)` on a body that was read: in a thread where the body is large."""
    if len(await request.body()) > _LARGE:
        return await asyncio.to_thread(work, *args)
    return work(*args)


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
