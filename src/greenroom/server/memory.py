"""Gives memory that requests have left behind back to the system.

glibc keeps what a thread has freed for that thread's arena. A large body or grammar would so
stay in the process for good, once for every thread that ever met one. Knows no requests.
"""

import asyncio
import contextlib
import ctypes
from collections.abc import AsyncIterator, Callable

SECONDS = 10.0  # between two trims; each takes a few milliseconds, off the event loop


def _trim_function() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library has none, such as musl."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = ctypes.CDLL(None).malloc_trim
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
        return function
    return None


@contextlib.asynccontextmanager
async def trimmed(seconds: float = SECONDS) -> AsyncIterator[None]:
    """While it is open, freed memory goes back to the system now and then."""
    trim = _trim_function()
    if trim is None:
        yield
        return

    async def keep_trimming() -> None:
        while True:
            await asyncio.sleep(seconds)
            await asyncio.to_thread(trim, 0)

    task = asyncio.ensure_future(keep_trimming())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
