"""Requests that are hostile or merely large, for the event loop to stay free of."""

import asyncio
import json
from typing import Any

from greenroom.server import Caps, ServerSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}
BODY = {"messages": [USER]}
TEXT = 7 << 20  # bytes; a body may have 8 MiB
SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def said(text: str) -> Any:
    return CHAT, {"messages": [{"role": "user", "content": text}]}


def listed(item: bytes, field: bytes = b"prompt") -> Any:
    path = COMPLETIONS if field == b"prompt" else CHAT
    items = b",".join([item] * (TEXT // (len(item) + 1)))
    return path, b'{"%s":[%s]}' % (field, items)


HEAVY: dict[str, tuple[str, Any]] = {
    "a chat": said("word " * 700),
    "text of words": said("word " * (TEXT // 5)),
    "text that just fits": said("word " * 52_000),
    "text of marks": said("<|<|" * (TEXT // 4)),
    "text of spaces": said(" " * TEXT),
    "text that is not ASCII": said("永和九年" * (TEXT // 12)),
    "text to complete": (COMPLETIONS, {"prompt": "word " * (TEXT // 5)}),
    "schema": (CHAT, BODY | {"max_tokens": 3, "response_format": FORM}),
    "tools": (CHAT, BODY | {"tools": [TOOL] * 20}),
    "demanded tools": (CHAT, BODY | {"tools": [TOOL] * 20, "tool_choice": "required", "n": 4}),
    "as many messages as may be": (CHAT, {"messages": [USER] * 4096}),
    "more messages": (CHAT, {"messages": [USER] * 20_000}),
    "wrong messages": (CHAT, {"messages": [{"role": "user", "zz": 1}] * 20_000}),
    "messages of parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 20_000}]},
    ),
    "more parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 60_000}]},
    ),
    "empty messages": listed(b"{}", b"messages"),
    "token ids": (COMPLETIONS, {"prompt": [5] * 100_000}),
    "ids without end": listed(b"5"),
    "wrong ids": listed(b"1.5"),
    "empty lists": listed(b"[]"),
    "nested lists": (COMPLETIONS, b'{"prompt":' + b"[" * TEXT),
    "unknown fields": (CHAT, BODY | {f"a{i}": 1 for i in range(300_000)}),
    "a small body of wrong parts": (
        CHAT,
        b'{"messages":[{"role":"user","content":[%s]}]}' % b",".join([b"{}"] * 10_000),
    ),
    "echo": (COMPLETIONS, {"prompt": "word " * 700, "max_tokens": 1, "echo": True}),
    "streamed echo": (
        COMPLETIONS,
        {"prompt": "word " * 700, "max_tokens": 1, "echo": True, "stream": True},
    ),
    "scored prompt": (
        COMPLETIONS,
        {"prompt": "word " * 700, "max_tokens": 1, "echo": True, "logprobs": 5},
    ),
    "tokenize": ("/tokenize", {"prompt": "word " * 7000, "return_token_strs": True}),
    "text to tokenize": ("/tokenize", {"prompt": "word " * (TEXT // 5)}),
    "detokenize": ("/detokenize", {"tokens": [65] * 100_000}),
    "embeddings": ("/v1/embeddings", {"input": ["x"] * 256}),
}


def scope_of(path: str) -> dict[str, Any]:
    """An ASGI request from this machine."""
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"localhost")],
        "server": ("localhost", 80),
        "root_path": "",
    }


async def post(app: Any, path: str, raw: bytes) -> int:
    """The status of the answer."""
    status: list[int] = []
    parts = [raw[at : at + 65536] for at in range(0, len(raw), 65536)]

    async def receive() -> Any:
        if not parts:
            await asyncio.sleep(1000)
        body = parts.pop(0)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        status.append(message.get("status", 0))

    await app(scope_of(path), receive, send)
    return status[0]


def request(name: str) -> tuple[str, bytes]:
    """Path and body."""
    path, body = HEAVY[name]
    return path, body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()


def prepared(make_client: Any, engine: Any, name: str) -> Any:
    """A client whose server has its workers running."""
    client = make_client(settings=ServerSettings(caps=Caps(compile_seconds=60)))
    engine.width = 2880
    if "text" in name:  # else it is seen at once that they cannot fit
        engine.config.context_length = 1 << 18
    small = BODY | {"max_tokens": 1, "response_format": {"type": "json_object"}}
    client.run(post(client.app, CHAT, json.dumps(small).encode()))
    return client
