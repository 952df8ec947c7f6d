"""Greenroom's own routes: health, readiness, metrics, tokens, properties, placement."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.body import apart, read, takes
from greenroom.server.large import large_response
from greenroom.server.placement import placement_picture
from greenroom.server.protocol.local import DetokenizeRequest, TokenizeRequest
from greenroom.server.responder import Json, state
from greenroom.server.routes.chat import template_message
from greenroom.server.routes.models import package_version
from greenroom.server.served import Served

router = APIRouter(tags=["Greenroom"])


@router.get("/health")
async def health() -> Response:
    """Whether the process lives."""
    return Json({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests are accepted: 503 while the server shuts down."""
    state(request).runner.refuse_when_draining()
    return Json({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Everything Prometheus scrapes."""
    text = state(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@asynccontextmanager
async def _leased(request: Request, name: str | None) -> AsyncIterator[Served]:
    registry = state(request).registry
    served = await registry.lease(name)
    try:
        yield served
    finally:
        registry.release(served)


Dicts = list[dict[str, Any]]


def _conversation(body: TokenizeRequest) -> tuple[Dicts, Dicts]:
    """Messages and tools as the chat template takes them."""
    messages = [template_message(message) for message in body.messages or ()]
    return messages, [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


@router.post("/tokenize", **takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of messages as the model's chat template writes them."""
    body = await read(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: give either prompt or messages", "prompt")
    async with _leased(request, body.model) as served:
        if body.messages is not None:
            messages, tools = await apart(request, _conversation, body)
            tokens = await served.render(messages, tools, None, body.add_generation_prompt)
        else:
            tokens = await served.tokenize(body.prompt or "", body.add_special_tokens)
        tokenizer = served.engine.tokenizer
        names: list[str] | None = None
        if body.return_token_strs:
            names = await served.in_worker(lambda: [tokenizer.decode([t]) for t in tokens])
        length = served.context_length
    found = {"count": len(tokens), "max_model_len": length, "tokens": tokens}
    return await large_response(found | {"token_strs": names})


@router.post("/detokenize", **takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    body = await read(request, DetokenizeRequest)
    async with _leased(request, body.model) as served:
        tokenizer = served.engine.tokenizer
        size = tokenizer.vocabulary_size
        if max(body.tokens, default=0) >= size:
            message = f"tokens: {max(body.tokens)} is outside the vocabulary of {size}"
            raise RequestError(message, "tokens")
        text = await served.in_worker(tokenizer.decode, body.tokens)
    return await large_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The special tokens, as evaluation harnesses ask for them."""
    async with _leased(request, model) as served:
        tokenizer = served.engine.tokenizer

        def text(token: int | None) -> str | None:
            return None if token is None else tokenizer.decode([token])

        found = {
            "eos_token": text(tokenizer.eos_id),
            "bos_token": text(tokenizer.bos_id),
            "pad_token": None,
            "vocab_size": tokenizer.vocabulary_size,
            "model_max_length": served.context_length,
        }
    return Json(found)


@router.get("/props")
async def props(request: Request) -> Response:
    """The server's version and limits, and each loaded model's state."""
    server = state(request)
    caps = server.settings.caps
    loaded: dict[str, Any] = {}
    for name, served in server.registry.loaded.items():
        loaded[name] = {
            "context_length": served.context_length,
            "max_sequences": served.engine.config.max_sequences,
            "chat": getattr(served.engine.chat, "source", "none") != "none",
            "stats": served.engine.stats(),
        }
    limits = {name: getattr(caps, name) for name in caps.__slots__}
    found = {"version": package_version(), "limits": limits, "loaded": loaded}
    return Json(found)


@router.get("/placement")
async def placement(request: Request, model: str | None = None) -> Response:
    """Which expert sits in which tier, how much it is wanted, and memory against budgets."""
    registry = state(request).registry
    name = registry.resolve(model).name if model else next(reversed(registry.loaded), None)
    if name is None or name not in registry.loaded:
        return Json({"model": name, "loaded": False})
    return Json(placement_picture(registry.loaded[name]))
