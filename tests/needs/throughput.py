"""Tokens per second of the server with one client and with eight, and of the engine with the
same eight prompts in one batch: figures to look at, on a machine that does nothing else.

    python tests/needs/throughput.py [ROUNDS] [MODEL.gguf]

Without a model it is that of `greenroom demo`. Engine, server and client are three processes;
in each round they take turns, so that a machine that changes its speed is unfair to none.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from urllib.parse import urlsplit

TOKENS, CLIENTS = 128, 8
PROMPTS = [f"Say something about the number {number}." for number in range(CLIENTS)]
ENGINE = """
import sys, time
from greenroom.engine import LLM, SamplingParams
prompts = sys.argv[2:]
params = SamplingParams(max_tokens=int(sys.argv[1]), temperature=0, ignore_eos=True)
with LLM(sys.stdin.readline().strip(), max_sequences=len(prompts), context_length=2048) as llm:
    ids = [llm.engine.chat.render([{"role": "user", "content": p}]) for p in prompts]
    print("ready", flush=True)
    while sys.stdin.readline():
        start = time.perf_counter()
        answers = llm.generate(ids, params)
        seconds = time.perf_counter() - start
        print(sum(len(answer.token_ids) for answer in answers) / seconds, flush=True)
"""


async def answer(address: tuple[str, int], prompt: str) -> int:
    """Streams one answer; how many tokens the server says it had."""
    messages = [{"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + raw)
    text = await reader.read()
    writer.close()
    return int(text.rpartition(b'"completion_tokens":')[2].partition(b",")[0])


async def crowd(address: tuple[str, int], prompts: list[str]) -> float:
    """Tokens per second of all together."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(answer(address, prompt) for prompt in prompts))
    return sum(counts) / (time.perf_counter() - start)


def ask(engine: "subprocess.Popen[str]", line: str) -> str:
    engine.stdin.write(line + "\n")
    engine.stdin.flush()
    return engine.stdout.readline()


def demo() -> str:
    from greenroom.convert.upcycle_demo import demo_model

    return str(demo_model(75, lambda title: __import__("contextlib").nullcontext()))


def main(rounds: int, model: str) -> None:
    python, piped = [sys.executable], {"stdin": subprocess.PIPE, "text": True}
    serve = [*python, "-m", "greenroom", "serve", model, "--port", "0", "--context", "2048"]
    serve += ["--max-sequences", str(CLIENTS), "--no-access-log"]
    server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    call = [*python, "-c", ENGINE, str(TOKENS), *PROMPTS]
    engine = subprocess.Popen(call, stdout=subprocess.PIPE, **piped)
    try:
        url = next(line.split()[-1] for line in server.stderr if line.startswith("Greenroom"))
        address = urlsplit(url).hostname, urlsplit(url).port
        assert ask(engine, model) == "ready\n"
        rows = []
        for number in range(rounds + 1):
            alone = asyncio.run(crowd(address, PROMPTS[:1]))
            batch = float(ask(engine, ""))
            eight = asyncio.run(crowd(address, PROMPTS))
            if number:  # the first one warms up
                rows.append((alone, eight, batch, eight / alone, eight / batch))
                print(" ".join(f"{value:8.2f}" for value in rows[-1]), flush=True)
    finally:
        for process in (server, engine):
            process.terminate()
            process.communicate(timeout=60)
    one, eight, batch, more, share = map(statistics.median, zip(*rows, strict=True))
    print(
        f"one client {one:.1f}, eight {eight:.1f} ({more:.2f} times), engine {batch:.1f} tokens/s"
    )
    print(f"eight clients get {share:.3f} of the engine's figure (medians of {rounds} rounds)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8, sys.argv[2] if len(sys.argv) > 2 else demo())
