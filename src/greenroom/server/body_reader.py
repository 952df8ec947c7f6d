"""Has large request bodies read by a worker process, so that neither their JSON nor their
errors hold up the event loop. Starts the process on first use and again when it died. Knows
nothing of what a body says.
"""

import asyncio
import atexit
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from greenroom.server.body_worker import ANSWER, READ, REQUEST
from greenroom.server.errors import ApiError


class BodyReader:
    """Reads bodies one at a time, in the order in which they come.

    Args:
        seconds: processor time that one body may take.
        memory: address space of the worker in bytes.
    """

    def __init__(self, seconds: float = 10.0, memory: int = 2 << 30) -> None:
        self._seconds, self._memory = seconds, memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="greenroom-bodies")
        self._process: subprocess.Popen[bytes] | None = None

    async def read(self, name: str, raw: bytes, limits: tuple[int, int]) -> Any:
        """The body as the request model of this name.

        Args:
            name: of a model of `body_models`.
            raw: the body.
            limits: most texts, lists and objects; most numbers.

        Raises:
            ApiError: 400, what is wrong with it.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read, name, raw, limits)

    def close(self) -> None:
        """Ends the worker; the next body starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, name: str, raw: bytes, limits: tuple[int, int]) -> Any:
        kind, content = self._ask(name.encode(), raw, limits)
        if kind == READ:
            return pickle.loads(content)  # written by our own code from a checked body
        message, field, code = json.loads(content)
        raise ApiError(400, message, field=field, code=code)

    def _ask(self, name: bytes, raw: bytes, limits: tuple[int, int]) -> tuple[bytes, bytes]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(REQUEST.pack(*limits, len(name), len(raw)) + name)
            process.stdin.write(raw)
            process.stdin.flush()
            head = process.stdout.read(ANSWER.size)
        except OSError:
            head = b""
        if len(head) < ANSWER.size:
            self.close()
            message = "the body cannot be read: it needs too much time or memory"
            raise ApiError(400, message, code="invalid_value")
        kind, size = ANSWER.unpack(head)
        return kind, process.stdout.read(size)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        module = "greenroom.server.body_worker"
        command = [sys.executable, "-P", "-m", module, str(self._seconds), str(self._memory)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )


@cache
def shared_reader() -> BodyReader:
    """The one reader of this process; ended when it exits."""
    reader = BodyReader()
    atexit.register(reader.close)
    return reader
