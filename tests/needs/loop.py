"""How long the event loop is held up by requests that are hostile or merely large, and how soon
`/v1/models` answers: figures to look at, on a machine that does nothing else.

    python tests/needs/loop.py [ROUNDS]

For each request of `tests/server/heavy.py` the longest pause between two turns of the loop in
the median round, as a clock on the wall sees it, and the time that the loop's own thread worked
in its longest turn. A call in another thread that keeps the interpreter lock is in the former.
"""

import asyncio
import contextlib
import gc
import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from conftest import Client, FakeEngine
from heavy import HEAVY, post, prepared, request

from greenroom.server import create_app

BEAT = 0.001  # seconds between two looks at the clocks


async def longest_pause(work: Any) -> tuple[float, float]:
    """Seconds on the wall, seconds of the loop's thread."""
    clocks = (time.perf_counter, time.thread_time)
    longest, last = [0.0, 0.0], [clock() for clock in clocks]

    async def beat() -> None:
        while True:
            await asyncio.sleep(BEAT)
            for number, clock in enumerate(clocks):
                now = clock()
                longest[number] = max(longest[number], now - last[number] - BEAT * (not number))
                last[number] = now

    beating = asyncio.ensure_future(beat())
    assert await work in (200, 400)
    await asyncio.sleep(5 * BEAT)
    beating.cancel()
    return longest[0], longest[1]


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """As `launch.run` leaves the garbage collector."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def pauses(name: str, rounds: int) -> tuple[float, float]:
    """Medians of `longest_pause`."""
    engine = FakeEngine()

    def make(settings: Any) -> Client:
        return Client(create_app(engine, settings, None, name="fake"))

    client = prepared(make, engine, name)
    path, raw = request(name)
    client.run(post(client.app, path, raw[:40_000]))
    with collected():
        found = [client.run(longest_pause(post(client.app, path, raw))) for _ in range(rounds)]
    client.close()
    wall, own = (statistics.median(column) for column in zip(*found, strict=True))
    return wall, own


def first_bytes(count: int = 200) -> list[float]:
    """Seconds until `/v1/models` begins to answer, sorted; one connection."""
    command = [sys.executable, str(Path(sys.path[0], "serve_fake.py")), "-", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            address = urlsplit(process.stdout.readline().strip()).netloc
            connection, seconds = http.client.HTTPConnection(address), []
            for _ in range(count):
                started = time.perf_counter()
                connection.request("GET", "/v1/models")
                answer = connection.getresponse()  # the head has come
                seconds.append(time.perf_counter() - started)
                answer.read()
            return sorted(seconds[5:])
        finally:
            process.kill()


def main(rounds: int) -> None:
    sys.setswitchinterval(2e-4)  # the engine's
    print("ms: longest pause, longest turn of the loop's own thread")
    worst = 0.0
    for name in HEAVY:
        wall, own = pauses(name, rounds)
        worst = max(worst, wall)
        print(f"{1e3 * wall:6.1f} {1e3 * own:6.1f}  {name}", flush=True)
    print(f"{1e3 * worst:6.1f}  the worst")
    seconds = first_bytes()
    middle, late = statistics.median(seconds), seconds[int(0.99 * len(seconds))]
    print(f"/v1/models: first byte after {1e3 * middle:.2f} ms, 99th of 100 {1e3 * late:.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
