"""Brings results from the engine's thread to an event loop. Knows queues, not what is in them."""

import asyncio
from collections import deque
from typing import Any


class Postbox:
    """Fills queues of one event loop; wakes the loop once for all that comes before its turn.

    Args:
        loop: to which the queues belong.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], object]] = deque()
        self._called = False

    def post(self, queue: asyncio.Queue[Any], item: object) -> None:
        """Puts an item into a queue; from any one thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._items.append((queue, item))
        if self._called:
            return
        self._called = True
        try:
            self.loop.call_soon_threadsafe(self._empty)
        except RuntimeError:
            self._called = False
            self._items.clear()
            raise

    def _empty(self) -> None:
        self._called = False  # first: what is posted from now on calls again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
