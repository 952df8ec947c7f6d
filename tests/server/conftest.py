"""A fake engine with a real tokenizer and chat format, so that API tests need no model."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from greenroom.engine.output import TextStream, TokenLogprob, TokenOutput
from greenroom.errors import EngineClosedError
from greenroom.server import ServerSettings, create_app
from greenroom.server.security import KeyRing
from greenroom.tokenizer.chat import ChatFormat
from greenroom.tokenizer.tokenizer import Tokenizer

CONTROL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = (
    "{%- if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif -%}"
    "{%- for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    "{%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
)


def byte_texts() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def metadata() -> dict[str, Any]:
    """GGUF metadata of a byte-level vocabulary; token 256 begins, 257 ends."""
    texts = byte_texts()
    tokens = texts + CONTROL + MARKS
    return {
        "general.architecture": "fake",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(CONTROL) + [4] * len(MARKS),
        "tokenizer.ggml.merges": [f"{texts[104]} {texts[105]}"][:0],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


@dataclass
class FakeEngine:
    """Answers every request with `reply`, a byte at a time, within stops and grammars."""

    reply: str = "Hello, world."
    delay: float = 0.0
    tokenizer: Any = None
    chat: Any = None
    width: int = 3
    running: int = 0
    cancelled: int = 0
    yielded: int = 0
    closed: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_metadata(metadata())
        self.chat = ChatFormat.from_metadata(metadata(), self.tokenizer)
        self.config = SimpleNamespace(max_sequences=4, context_length=4096)
        moe = SimpleNamespace(experts=8, dense_layers=0)
        size = self.tokenizer.vocabulary_size
        self.model_config = SimpleNamespace(
            architecture="fake", vocabulary_size=size, context_length=4096, layers=2, moe=moe
        )

    def prompt_text(self, index: int = -1) -> str:
        return self.tokenizer.decode(self.prompts[index])

    async def stream(
        self, tokens: list[int], params: Any, constraint: Any = None
    ) -> AsyncIterator[TokenOutput]:
        self.prompts.append(tokens)
        self.params.append(params)
        self.running += 1
        text = TextStream(self.tokenizer.stream(), params.stop)
        wanted = [*self.tokenizer.encode(self.reply, parse_special=True), 257]
        reason = None
        try:
            for number in range(4096):
                await asyncio.sleep(self.delay)
                if self.closed:
                    raise EngineClosedError("the engine was closed")
                token = self._choose(wanted, number, constraint)
                ended = token in self.tokenizer.eog_ids
                said, stopped = ("", False) if ended else text.push(token)
                reason = "stop" if ended or stopped else None
                if constraint is not None and reason is None:
                    constraint.accept(token)
                    reason = "stop" if constraint.finished() else None
                if reason is None and number + 1 == params.max_tokens:
                    reason = "length"
                if reason and not stopped:
                    said += text.finish()[0]
                self.yielded += 1
                yield self._output(tokens, params, number, token, said, reason)
                if reason:
                    return
        finally:
            self.running -= 1
            self.cancelled += reason is None

    def _choose(self, wanted: list[int], number: int, constraint: Any) -> int:
        token = wanted[min(number, len(wanted) - 1)]
        if constraint is None:
            return token
        mask = constraint.mask()
        assert mask.shape == (self.tokenizer.vocabulary_size,)
        if mask[token]:
            return token
        if mask[257]:
            return 257
        likes = [*b'"}]0123456789abcdefghijklmnopqrstuvwxyz{[,: ', *np.flatnonzero(mask)]
        return int(next(t for t in likes if mask[t]))

    def _output(
        self, tokens: list[int], params: Any, number: int, token: int, said: str, reason: Any
    ) -> TokenOutput:
        top = ((token, -0.5), (120, -1.5))[: params.logprobs or 0]
        of_prompt = None
        if number == 0 and params.prompt_logprobs is not None:
            of_prompt = (None, *(TokenLogprob(-1.0, ((t, -1.0),)) for t in tokens[1:]))
        return TokenOutput(
            token,
            said,
            logprob=None if params.logprobs is None else -0.5,
            top_logprobs=top,
            finish_reason=reason,
            time=time.perf_counter(),
            prompt_logprobs=of_prompt,
            cached_tokens=3,
        )

    async def embed(self, tokens: list[int]) -> np.ndarray:
        vector = np.zeros(self.width, dtype=np.float32)
        vector[:3] = len(tokens), 3.0, 4.0
        return vector

    def stats(self) -> dict[str, Any]:
        return {
            "waiting": 0,
            "running": self.running,
            "preemptions": 0,
            "cache": [{"window": None, "blocks": 8, "held": 2, "reusable": 0}],
            "counts": {"prompt_tokens": 10, "reused_tokens": 3, "generated_tokens": 7},
            "memory": {"experts": 1000, "dense": 500, "kv_cache": 100},
        }

    def close(self) -> None:
        self.closed = True


class Client:
    """A synchronous client of an application in its own event loop."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        self.app = app
        self.headers = {"host": "localhost", **(headers or {})}
        self.loop = asyncio.new_event_loop()
        self._lifespan = app.router.lifespan_context(app)
        self.run(self._lifespan.__aenter__())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=self.headers
            ) as client:
                return await client.request(method, path, **kwargs)

        return self.run(ask())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return self.request("POST", path, **kwargs)

    def ok(self, path: str, body: Any) -> Any:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of every server-sent event, without [DONE]."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        datas = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        return [json.loads(data) for data in datas if data != "[DONE]"]

    def lines(self, path: str, body: Any) -> list[Any]:
        """Newline-delimited JSON."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    def close(self) -> None:
        self.run(self._lifespan.__aexit__(None, None, None))
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_engine() -> Any:
    return FakeEngine


@pytest.fixture
def make_client(engine: FakeEngine) -> Iterator[Any]:
    made = []

    def make(
        models: Any = None,
        settings: ServerSettings | None = None,
        keys: KeyRing | None = None,
        headers: dict[str, str] | None = None,
    ) -> Client:
        app = create_app(models or engine, settings or ServerSettings(), keys, name="fake")
        made.append(Client(app, headers))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make_client: Any) -> Client:
    return make_client()
