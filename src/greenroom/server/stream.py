"""Answers that come in pieces: server-sent events and Ollama's lines of JSON.

Each response watches the connection: when the client leaves, the source is closed at once,
which cancels the generation within one engine step. Knows bytes, not what they mean.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
Close = Callable[[], Awaitable[None]]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(value: Any) -> bytes:
    """Compact JSON as UTF-8."""
    return _compact(value).encode()


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event, with its name where the API uses names."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + encode(value) + b"\n\n"


def line(value: Any) -> bytes:
    """One line of newline-delimited JSON."""
    return encode(value) + b"\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGoneError: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(task)
        await _cancel(gone)


async def _cancel(task: "asyncio.Future[Any]") -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Stream(Response):
    """A response whose body is an async iterator of byte chunks.

    Args:
        chunks: the body; an exception it raises becomes a last chunk made by `on_error`.
        close: releases what the chunks are made from; called exactly once, however it ends.
        on_error: the chunk that tells the client of an error after the head was sent.
        media_type: `text/event-stream`, or `application/x-ndjson` for Ollama.
        ping: (seconds, chunk) to send in silence, or None.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Close,
        on_error: Callable[[Exception], bytes],
        *,
        media_type: str = "text/event-stream",
        ping: float | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
        self.chunks, self.close, self.on_error, self.ping = chunks, close, on_error, ping
        self._silent = True

    async def _send_all(self, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        pinging = asyncio.ensure_future(self._fill_silence(send))
        try:
            async for chunk in self._with_error():
                self._silent = False
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            await _cancel(pinging)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_error(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.chunks:
                yield chunk
        except Exception as error:
            yield self.on_error(error)

    async def _fill_silence(self, send: Send) -> None:
        while self.ping is not None:
            self._silent = True
            await asyncio.sleep(self.ping)
            if self._silent:
                await send({"type": "http.response.body", "body": PING, "more_body": True})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # the client left while we were sending
                    sending.result()
        finally:
            await _cancel(sending)
            await _cancel(gone)
            await self.close()
