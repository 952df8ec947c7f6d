"""Puts the application together: routes, errors, guard, models. Knows no command line.

`create_app(engine)` needs nothing of an engine but `stream`, `embed`, `stats`, `close`,
`tokenizer`, `chat`, `config` and `model_config`.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import GreenroomError
from greenroom.server.body import component_schemas
from greenroom.server.errors import ApiError, answer_error
from greenroom.server.generation import Runner
from greenroom.server.memory import trimmed
from greenroom.server.metrics import Metrics
from greenroom.server.page import mount_page
from greenroom.server.registry import Registry
from greenroom.server.responder import State
from greenroom.server.routes import (
    anthropic,
    chat,
    completions,
    embeddings,
    local,
    models,
    ollama,
    responses,
)
from greenroom.server.security import Guard, KeyRing
from greenroom.server.settings import ServerSettings
from greenroom.server.stream import ClientGoneError

ROUTERS = (chat, completions, responses, embeddings, anthropic, models, ollama, local)


def create_app(
    models: Any,
    settings: ServerSettings | None = None,
    keys: KeyRing | None = None,
    name: str = "greenroom",
) -> FastAPI:
    """The application.

    Args:
        models: makes a Registry, once the event loop runs; or one engine, which is then
            served as `name` and closed with the application.
        settings: limits and allowed hosts; None takes the defaults.
        keys: API keys; None lets everybody ask.
        name: of a single engine.
    """
    settings = settings or ServerSettings()

    def registry() -> Registry:
        return models() if callable(models) else Registry.of(models, name, settings)

    app = FastAPI(
        title="Greenroom",
        description="Mixture-of-Experts models far larger than the GPU.",
        lifespan=_lifespan(registry, settings),
        docs_url=None,
        redoc_url=None,
    )
    for module in ROUTERS:
        app.include_router(module.router)
    mount_page(app)
    for kind in (ApiError, GreenroomError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientGoneError, _answer_gone)
    app.openapi = _openapi(app, app.openapi)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=settings, keys=keys or KeyRing())
    return app


def _lifespan(registry: Callable[[], Registry], settings: ServerSettings) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        found = registry()
        await found.prepare()
        metrics = Metrics(found.stats)
        runner = Runner(found, metrics, settings.caps)
        app.state.server = State(found, runner, metrics, settings)
        async with trimmed():
            yield
        await found.close()

    return lifespan


async def _answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own errors (404, 405) in our shape."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await answer_error(request, ApiError(error.status_code, message, headers=headers))


async def _answer_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's status; nobody is there to read it


def _openapi(app: FastAPI, plain: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI's document, with the bodies that it does not see."""

    def openapi() -> dict[str, Any]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(component_schemas())
        return document

    return openapi
