"""Thirty-two clients for ten minutes: answers, streams, cancellations, hostile bodies.

    python tests/needs/soak.py [SECONDS]

Ends with an error if a sequence, a cache block or a file descriptor is left over, if memory
grew by more than 5 % after the warm-up, or if anything was answered with a 5xx other than 503.
The warm-up is a minute, or half of the time if that is less: until then each block of the KV
cache is touched for the first time. Memory is what the server and its workers hold 12 seconds
after the last request, when what was freed has gone back to the system.
"""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

CLIENTS = 32
WARM_UP = 60.0
SETTLE = 12.0  # longer than the server takes to give memory back
MODEL = "qwen3-30b-a3b-tiny"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HOSTILE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [], "n": 1e400}',
    json.dumps({"messages": [{"role": "user", "content": "x"}], "n": 10**9}).encode(),
    json.dumps({"prompt": [2**40], "max_tokens": 1}).encode(),
    json.dumps({"prompt": "x " * 50_000}).encode(),
    json.dumps(
        {"prompt": "x", "response_format": {"type": "regex", "pattern": "(" * 9000}}
    ).encode(),
    json.dumps(
        {"prompt": "x", "response_format": {"type": "regex", "pattern": "(a{999}){999}"}}
    ).encode(),
    json.dumps({"prompt": "x", "logit_bias": {"99999999999": 1}}).encode(),
)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/api/chat")


def body(path: str, chance: random.Random) -> dict[str, Any]:
    """A request that is in order."""
    words = " ".join(chance.choices(["green", "room", "stage", "actor"], k=chance.randint(1, 60)))
    limit = chance.randint(1, 40)
    stream = chance.random() < 0.6
    if path == "/v1/completions":
        found: dict[str, Any] = {"prompt": words, "max_tokens": limit, "stream": stream}
        return found | ({"logprobs": 2, "n": 2} if chance.random() < 0.3 else {})
    if path == "/v1/responses":
        return {"input": words, "max_output_tokens": limit, "stream": stream}
    messages = [{"role": "user", "content": words}]
    if path == "/api/chat":
        return {"model": "tiny", "messages": messages, "options": {"num_predict": limit}}
    found = {"messages": messages, "max_tokens": limit, "stream": stream}
    if path == "/v1/chat/completions" and chance.random() < 0.2:
        form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        found["response_format"] = form
    return found


async def one_client(url: str, seed: int, until: float, seen: Counter[str]) -> None:
    """Asks until the time is over; leaves some answers half read."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            path = chance.choice(PATHS)
            hostile = chance.random() < 0.15
            raw = chance.choice(HOSTILE) if hostile else json.dumps(body(path, chance)).encode()
            patience = chance.uniform(0.0, 0.3) if chance.random() < 0.25 else 120
            try:
                async with asyncio.timeout(patience):
                    response = await client.post(path, content=raw)
                seen[str(response.status_code)] += 1
                if response.status_code >= 500 and response.status_code != 503:
                    print(path, raw[:200], response.text[:300], file=sys.stderr)
            except TimeoutError:
                seen["left"] += 1
            except httpx.HTTPError as error:
                seen[type(error).__name__] += 1


def state(url: str, process: psutil.Process) -> dict[str, float]:
    """What must not grow."""
    props = httpx.get(url + "/props").json()
    (loaded,) = props["loaded"].values()
    stats = loaded["stats"]
    return {
        "running": stats["running"] + stats["waiting"],
        "held": sum(pool["held"] for pool in stats["cache"]),
        "files": process.num_fds(),
        "memory": sum(p.memory_info().rss for p in (process, *process.children())),
    }


async def soak(url: str, process: psutil.Process, seconds: float) -> int:
    seen: Counter[str] = Counter()

    async def crowd(until: float, seed: int) -> None:
        clients = (one_client(url, seed + n, until, seen) for n in range(CLIENTS))
        await asyncio.gather(*clients)
        await asyncio.sleep(SETTLE)

    await crowd(time.monotonic() + min(WARM_UP, seconds / 2), 0)
    before = state(url, process)
    await crowd(time.monotonic() + seconds, 1000)
    after = state(url, process)
    print("answers:", dict(sorted(seen.items())))
    print("before:", before)
    print("after: ", after)
    print(f"memory: {after['memory'] / before['memory'] - 1:+.2%}")
    wrong = [code for code in seen if code.startswith("5") and code != "503"]
    problems = {
        "sequences left": after["running"] > 0,
        "blocks left": after["held"] > 0,
        "files left": after["files"] > before["files"] + 2,
        "memory grew": after["memory"] > before["memory"] * 1.05,
        f"answers {wrong}": bool(wrong),
    }
    found = [name for name, bad in problems.items() if bad]
    print("soak: " + (", ".join(found) or "fine"))
    return len(found)


def main(seconds: float) -> int:
    greenroom = [sys.executable, "-m", "greenroom"]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "tiny.gguf"))
        subprocess.run([*greenroom, "synth", MODEL, file], check=True, stdout=subprocess.DEVNULL)
        command = [*greenroom, "serve", file, "--port", "0", "--context", "2048"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            url = next(line.split()[-1] for line in process.stderr if line.startswith("Greenroom"))
            logged: list[str] = []
            threading.Thread(target=lambda: logged.extend(process.stderr), daemon=True).start()
            found = asyncio.run(soak(url, psutil.Process(process.pid), seconds))
            errors = [line for line in logged if "ERROR" in line or "Traceback" in line]
            print("".join(errors[:20]), end="")
            return found + len(errors)
        finally:
            process.terminate()
            process.communicate(timeout=60)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0))
