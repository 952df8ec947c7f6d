"""The web page: static files of this package, served with headers that keep it closed to
everything from elsewhere. Its script talks to the same routes as any other client.
"""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from greenroom.server.errors import ApiError

STATIC = Path(__file__).with_name("static")
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "app.js": ("app.js", "text/javascript; charset=utf-8"),
    "docs.html": ("docs.html", "text/html; charset=utf-8"),
    "docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "placement.js": ("placement.js", "text/javascript; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def _file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(404, f"there is no /static/{name}")
    file, media_type = FILES[name]
    return FileResponse(STATIC / file, media_type=media_type, headers=HEADERS)


async def index(request: Request) -> Response:
    """The page."""
    return _file("")


async def docs(request: Request) -> Response:
    """The API, described by its own OpenAPI document."""
    return _file("docs.html")


async def static(request: Request) -> Response:
    """One of its files."""
    return _file(request.path_params["name"])


def mount_page(app: FastAPI) -> None:
    """Adds `/`, `/docs` and `/static/...`."""
    app.add_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_route("/docs", docs, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_route("/static/{name}", static, methods=["GET"], include_in_schema=False)
