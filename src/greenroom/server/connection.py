"""One client's connection: uvicorn's, which takes what came in one go and waits for ever.

Here a little is taken at a time, so that 256 KiB of one-byte chunks cannot hold the event loop
for half a second, and a connection on which a request does not get on is closed.
"""

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_PORTION = 4096  # bytes, at worst 700 chunks: 8 ms


class Connection(H11Protocol):
    """A connection that comes round to the others."""

    silent_seconds = 30.0  # time to send the head of a request

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: deque[bytes] = deque()
        self._seen: Any = None
        self._watch: asyncio.TimerHandle = self.loop.call_later(self.silent_seconds, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        self._waiting.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._waiting and len(data) <= _PORTION:
            super().data_received(data)
            return
        if not self._waiting:
            self.loop.call_soon(self._take)
            self.transport.pause_reading()
        self._waiting += (data[at : at + _PORTION] for at in range(0, len(data), _PORTION))

    def _take(self) -> None:
        if not self._waiting:  # the connection was lost
            return
        super().data_received(self._waiting.popleft())
        if self._waiting:
            self.loop.call_soon(self._take)
        elif not (self.flow.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def _check(self) -> None:
        """Closes the connection if twice in a row no request was running, and none ended
        between. The time for a body and between requests is limited elsewhere."""
        idle = self.cycle is None or self.cycle.response_complete
        mark = (id(self.cycle),) if idle else None
        if idle and (self.cycle is None or mark == self._seen):
            self.transport.close()
            return
        self._seen = mark
        self._watch = self.loop.call_later(self.silent_seconds, self._check)
