"""What the routes of all APIs share: the application's state, and the way from a call to a
response, whole or streamed.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from greenroom.server.call import Call
from greenroom.server.errors import api_error, error_body
from greenroom.server.generation import Generation, Runner
from greenroom.server.large import large_response
from greenroom.server.metrics import Metrics
from greenroom.server.registry import Registry
from greenroom.server.settings import ServerSettings
from greenroom.server.stream import Stream, encode, event, line, unless_gone

_MANY = 4096  # prompt tokens; an answer may repeat them
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class State:
    """What the routes need, under `request.app.state.server`."""

    registry: Registry
    runner: Runner
    metrics: Metrics
    settings: ServerSettings


def state(request: Request) -> State:
    """The application's state."""
    found: State = request.app.state.server
    return found


class Json(Response):
    """A JSON response, compact."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


async def whole(
    request: Request,
    call: Call,
    write: Callable[[Generation], Coroutine[Any, Any, Any]],
    keep_alive: float | None = None,
) -> Response:
    """Runs a call to its end and writes one JSON body; stops when the client leaves."""
    generation = await state(request).runner.start(call, keep_alive)
    try:
        found = await unless_gone(request, write(generation))
        large = generation.scored or generation.usage.prompt > _MANY
        return await large_response(found) if large else Json(found)
    finally:
        await generation.close()


async def streamed(
    request: Request,
    call: Call,
    write: Callable[[Generation], AsyncIterator[bytes]],
    media_type: str = EVENTS,
    keep_alive: float | None = None,
) -> Response:
    """Runs a call and sends what `write` makes of it as it comes."""
    settings = state(request).settings
    generation = await state(request).runner.start(call, keep_alive)
    path = request.url.path

    def on_error(error: Exception) -> bytes:
        body = error_body(path, api_error(error))
        if media_type == LINES:
            return line(body)
        return event(body, "error" if path.startswith("/v1/messages") else None)

    ping = settings.ping_seconds if media_type == EVENTS else None
    try:
        await generation.begin(settings.first_event_seconds)
    except BaseException:
        await generation.close()
        raise
    return Stream(write(generation), generation.close, on_error, media_type=media_type, ping=ping)
