"""Writes large JSON in a thread, a little at a time: the encoder keeps the interpreter lock, so
that one call for a large value would hold up the event loop from wherever it is made.
"""

import asyncio
from collections.abc import Iterator
from itertools import chain
from typing import Any

from starlette.responses import Response

from greenroom.server.stream import encode

_DEPTH = 5  # below it are values of one token: small
_NUMBERS = 1024  # written in one call
_CHARACTERS = 1 << 16  # likewise


def large_json(value: Any) -> bytes:
    """The same bytes as `encode`."""
    return b"".join(_pieces(value, 0))


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    if isinstance(value, str) and len(value) > _CHARACTERS:
        starts = range(0, len(value), _CHARACTERS)
        yield b'"'
        yield from (encode(value[at : at + _CHARACTERS])[1:-1] for at in starts)
        yield b'"'
    elif depth == _DEPTH or not value or not isinstance(value, dict | list | tuple):
        yield encode(value)
    elif isinstance(value, dict):
        items = ((encode(str(key)) + b":", item) for key, item in value.items())
        yield from _joined(b"{}", (chain((k,), _pieces(item, depth + 1)) for k, item in items))
    elif isinstance(value[0], int | float):
        runs = (value[at : at + _NUMBERS] for at in range(0, len(value), _NUMBERS))
        yield from _joined(b"[]", ((encode(run)[1:-1],) for run in runs))
    else:
        yield from _joined(b"[]", (_pieces(item, depth + 1) for item in value))


def _joined(brackets: bytes, items: Any) -> Iterator[bytes]:
    yield brackets[:1]
    for number, item in enumerate(items):
        if number:
            yield b","
        yield from item
    yield brackets[1:]


async def large_response(value: Any) -> Response:
    """A JSON response of a value that may be large."""
    content = await asyncio.to_thread(large_json, value)
    return Response(content, media_type="application/json")


async def large_event(value: Any) -> bytes:
    """A server-sent event of a value that may be large."""
    return b"data: " + await asyncio.to_thread(large_json, value) + b"\n\n"
