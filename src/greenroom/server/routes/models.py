"""Which models there are, in OpenAI's and Ollama's words: `/v1/models`, `/api/tags`,
`/api/show`, `/api/ps`, `/api/version`.
"""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.server.body import read, takes
from greenroom.server.describe import Description, describe
from greenroom.server.errors import ApiError
from greenroom.server.protocol.ollama import ShowRequest
from greenroom.server.registry import Registry
from greenroom.server.responder import Json, state
from greenroom.server.served import Served
from greenroom.server.source import ModelSource

router = APIRouter()


def package_version() -> str:
    """Greenroom's version."""
    try:
        return version("greenroom")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"


def _model(source: ModelSource, registry: Registry) -> dict[str, Any]:
    served = registry.loaded.get(source.name)
    created = served.created if served else int(source.modified)
    found = {"id": source.name, "object": "model", "created": created, "owned_by": "greenroom"}
    return found | ({"max_model_len": served.context_length} if served else {})


@router.get("/v1/models", tags=["OpenAI"])
async def models(request: Request) -> Response:
    """All models, loaded or not."""
    registry = state(request).registry
    found = [_model(source, registry) for source in registry.sources.values()]
    return Json({"object": "list", "data": found})


@router.get("/v1/models/{model:path}", tags=["OpenAI"])
async def model(request: Request, model: str) -> Response:
    """One model."""
    registry = state(request).registry
    return Json(_model(registry.resolve(model), registry))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _digest(source: ModelSource) -> str:
    """Tells versions of a model apart. Not a hash of the content, which would take minutes."""
    text = f"{source.path}:{source.size}:{source.modified}"
    return hashlib.sha256(text.encode()).hexdigest()


def _details(description: Description) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": description.architecture,
        "families": [description.architecture] if description.architecture else [],
        "parameter_size": description.parameter_size,
        "quantization_level": description.quantization,
    }


async def _described(registry: Registry, source: ModelSource) -> Description:
    served = registry.loaded.get(source.name)
    return await describe(source, served, registry.workers)


async def _tag(registry: Registry, source: ModelSource) -> dict[str, Any]:
    description = await _described(registry, source)
    return {
        "name": source.name,
        "model": source.name,
        "modified_at": _time(source.modified),
        "size": source.size,
        "digest": _digest(source),
        "details": _details(description),
    }


@router.get("/api/tags", tags=["Ollama"])
async def tags(request: Request) -> Response:
    """All models, loaded or not."""
    registry = state(request).registry
    return Json({"models": [await _tag(registry, s) for s in registry.sources.values()]})


@router.get("/api/ps", tags=["Ollama"])
async def ps(request: Request) -> Response:
    """The models that are loaded."""
    registry = state(request).registry
    found = []
    for served in registry.loaded.values():
        memory = served.engine.stats().get("memory", {})
        vram = sum(size for part, size in memory.items() if "vram" in part)
        expires = served.expires
        found.append(
            await _tag(registry, registry.sources[served.name])
            | {
                "size": sum(memory.values()),
                "size_vram": vram,
                "context_length": served.context_length,
                "expires_at": "9999-12-31T23:59:59Z" if expires is None else _time(expires),
            }
        )
    return Json({"models": found})


def _capabilities(description: Description, served: Served | None) -> list[str]:
    found = ["completion", "embedding"]
    if "tools" in description.template:
        found.append("tools")
    if any(mark in description.template for mark in ("<think>", "analysis", "enable_thinking")):
        found.append("thinking")
    return found


@router.post("/api/show", tags=["Ollama"], **takes(ShowRequest))
async def show(request: Request) -> Response:
    """What one model is."""
    body = await read(request, ShowRequest)
    name = body.model or body.name
    if name is None:
        raise ApiError(400, "model: missing", field="model")
    registry = state(request).registry
    source = registry.resolve(name)
    description = await _described(registry, source)
    return Json(
        {
            "modelfile": "",
            "parameters": "",
            "template": description.template,
            "license": description.license,
            "modified_at": _time(source.modified),
            "details": _details(description),
            "model_info": description.metadata,
            "capabilities": _capabilities(description, registry.loaded.get(source.name)),
        }
    )


@router.get("/api/version", tags=["Ollama"])
async def api_version() -> Response:
    """Greenroom's version."""
    return Json({"version": package_version()})
