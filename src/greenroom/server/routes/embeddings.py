"""Embeddings: OpenAI's `POST /v1/embeddings`, Ollama's `POST /api/embed` and its older
`/api/embeddings`. A vector is the model's pooled final hidden state, scaled to length 1 but in
the last of them.
"""

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.body import read, takes
from greenroom.server.large import large_response
from greenroom.server.protocol.ollama import EmbeddingRequest, EmbedRequest
from greenroom.server.protocol.openai import EmbeddingsRequest
from greenroom.server.responder import state
from greenroom.server.routes.ollama import seconds_of
from greenroom.server.served import Served
from greenroom.server.stream import unless_gone

router = APIRouter()
Inputs = Sequence[str | list[int]]


@dataclass(frozen=True, slots=True)
class _Embedded:
    """What became of the inputs of one request."""

    model: str
    vectors: list[NDArray[np.float32]]  # (hidden,) each
    tokens: int
    started: float  # time.perf_counter() when the request came
    loaded: float  # the same when the model was there


def _inputs(body: EmbeddingsRequest, limit: int) -> list[str | list[int]]:
    value = body.input
    if isinstance(value, str):
        return [value]
    if not value:
        raise RequestError("input: the list is empty", "input")
    if isinstance(value[0], int):
        return [list(value)]
    if len(value) > limit:
        raise RequestError(f"input: {len(value)} texts, at most {limit}", "input")
    return list(value)


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12))


def _numbers(vector: NDArray[np.float32]) -> list[float]:
    return [round(float(value), 8) for value in vector]


async def _vectors(
    served: Served, inputs: Inputs, field: str
) -> tuple[list[NDArray[np.float32]], int]:
    prompts = []
    for text in inputs:
        if isinstance(text, str):
            served.check_length(len(text), field)
        tokens = await served.tokenize(text) if isinstance(text, str) else text
        served.check_prompt(tokens, None, None, field)
        prompts.append(tokens)
    vectors = await asyncio.gather(*(served.engine.embed(tokens) for tokens in prompts))
    return vectors, sum(map(len, prompts))


async def _embed(
    request: Request,
    model: str | None,
    inputs: Inputs,
    field: str = "input",
    keep_alive: float | None = None,
) -> _Embedded:
    """The vectors of all inputs; stops when the client leaves."""
    server, started = state(request), time.perf_counter()
    server.runner.refuse_when_draining()
    served = await server.registry.lease(model)
    places, loaded = 0, time.perf_counter()
    try:
        served.admit(1)
        places = 1
        vectors, tokens = await unless_gone(request, _vectors(served, inputs, field))
        return _Embedded(served.name, vectors, tokens, started, loaded)
    finally:
        if places:
            served.leave(places, time.perf_counter() - loaded)
        server.registry.release(served, keep_alive)


def _check_width(asked: int | None, vectors: Sequence[NDArray[np.float32]]) -> None:
    width = len(vectors[0])
    if asked not in (None, width):
        message = f"dimensions: this model's vectors have {width}, not {asked}"
        raise RequestError(message, "dimensions")


@router.post("/v1/embeddings", tags=["OpenAI"], **takes(EmbeddingsRequest))
async def embeddings(request: Request) -> Response:
    """Vectors of texts or token ids."""
    body = await read(request, EmbeddingsRequest)
    inputs = _inputs(body, state(request).settings.caps.prompts)
    found = await _embed(request, body.model, inputs)
    _check_width(body.dimensions, found.vectors)

    def written(vector: NDArray[np.float32]) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return _numbers(vector)

    def all_written() -> list[dict[str, Any]]:
        return [
            {"object": "embedding", "index": i, "embedding": written(_unit(v))}
            for i, v in enumerate(found.vectors)
        ]

    data = await asyncio.to_thread(all_written)
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return await large_response(
        {"object": "list", "data": data, "model": found.model, "usage": usage}
    )


@router.post("/api/embed", tags=["Ollama"], **takes(EmbedRequest))
async def ollama_embed(request: Request) -> Response:
    """Vectors of one text or several."""
    body = await read(request, EmbedRequest)
    limit = state(request).settings.caps.prompts
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if len(inputs) > limit:
        raise RequestError(f"input: {len(inputs)} texts, at most {limit}", "input")
    found = await _embed(request, body.model, inputs, "input", seconds_of(body.keep_alive))
    if found.vectors:
        _check_width(body.dimensions, found.vectors)
    units = await asyncio.to_thread(lambda: [_numbers(_unit(vector)) for vector in found.vectors])
    now = time.perf_counter()
    return await large_response(
        {
            "model": found.model,
            "embeddings": units,
            "total_duration": int((now - found.started) * 1e9),
            "load_duration": int((found.loaded - found.started) * 1e9),
            "prompt_eval_count": found.tokens,
        }
    )


@router.post("/api/embeddings", tags=["Ollama"], **takes(EmbeddingRequest))
async def ollama_embeddings(request: Request) -> Response:
    """The vector of one text, as it is; `/api/embed` scales it to length 1."""
    body = await read(request, EmbeddingRequest)
    keep_alive = seconds_of(body.keep_alive)
    found = await _embed(request, body.model, [body.prompt], "prompt", keep_alive)
    return await large_response({"embedding": _numbers(found.vectors[0])})
