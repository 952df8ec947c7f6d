"""OpenAI's embeddings: `POST /v1/embeddings`. A vector is the model's pooled final hidden
state, scaled to length 1.
"""

import asyncio
import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.body import read, takes
from greenroom.server.protocol.openai import EmbeddingsRequest
from greenroom.server.responder import Json, state
from greenroom.server.served import Served
from greenroom.server.stream import unless_gone

router = APIRouter(tags=["OpenAI"])


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


def _written(vector: NDArray[np.float32], encoding: str) -> Any:
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if encoding == "base64":
        return base64.b64encode(unit.astype("<f4").tobytes()).decode()
    return [round(float(value), 8) for value in unit]


async def _embed(
    served: Served, body: EmbeddingsRequest, inputs: list[str | list[int]]
) -> dict[str, Any]:
    prompts = []
    for text in inputs:
        tokens = await served.tokenize(text) if isinstance(text, str) else text
        served.check_prompt(tokens, None, None, "input")
        prompts.append(tokens)
    vectors = await asyncio.gather(*(served.engine.embed(tokens) for tokens in prompts))
    width = len(vectors[0])
    if body.dimensions not in (None, width):
        message = f"dimensions: this model's vectors have {width}, not {body.dimensions}"
        raise RequestError(message, "dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _written(v, body.encoding_format)}
        for i, v in enumerate(vectors)
    ]
    total = sum(map(len, prompts))
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


@router.post("/v1/embeddings", **takes(EmbeddingsRequest))
async def embeddings(request: Request) -> Response:
    """Vectors of texts or token ids."""
    body = await read(request, EmbeddingsRequest)
    server = state(request)
    server.runner.refuse_when_draining()
    inputs = _inputs(body, server.settings.caps.prompts)
    served = await server.registry.lease(body.model)
    places, started = 0, time.perf_counter()
    try:
        served.admit(1)
        places = 1
        return Json(await unless_gone(request, _embed(served, body, inputs)))
    finally:
        if places:
            served.leave(places, time.perf_counter() - started)
        server.registry.release(served)
