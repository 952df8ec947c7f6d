"""Who may ask: API keys, Host and Origin checks, CORS, and a cap on bodies.

Plain ASGI middleware around the whole application, so that no route can forget it.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from greenroom.errors import RequestError
from greenroom.server.errors import ApiError, error_body
from greenroom.server.settings import ServerSettings

log = logging.getLogger("greenroom.server")
OPEN_PATHS = frozenset({"/health"})
_PAGES = frozenset({"/", "/docs"})  # links from elsewhere may lead here
_METHODS = "GET, POST, OPTIONS"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(, ?[A-Za-z0-9-]+)*")


class KeyRing:
    """The API keys, kept as hashes. Without any, everybody may ask.

    Args:
        keys: given directly.
        file: more of them, one a line; `#` begins a comment. Read again by `reload`.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        self._given = frozenset(key.strip() for key in keys)
        if "" in self._given:
            raise RequestError("an API key is empty; leave the option out, or give a key")
        self._file = file
        self._hashes: frozenset[bytes] = frozenset()
        self.reload()

    def reload(self) -> int:
        """Reads the file again; the number of keys. On an error the keys stay as they were.

        Raises:
            RequestError: the file cannot be read or has no key.
        """
        keys = self._given | (_keys_in(self._file) if self._file else frozenset())
        self._hashes = frozenset(_hash(key) for key in keys)
        return len(self._hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def accepts(self, key: str) -> bool:
        """Whether this is a key; takes the same time for every wrong one."""
        given = _hash(key)
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _keys_in(file: Path) -> frozenset[str]:
    try:
        text = file.read_text()
        mode = os.stat(file).st_mode
    except OSError as error:
        raise RequestError(f"{file}: cannot read API keys: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s: others can read the API keys; chmod 600 it", file)
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    keys = frozenset(line for line in lines if line)
    if not keys:
        raise RequestError(f"{file}: there is no API key in it; write one per line")
    return keys


def presented_key(headers: Headers) -> str | None:
    """The key of a request: a bearer token, `x-api-key`, or the password of basic
    authentication, which is how a browser sends it.
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(value).decode().partition(":")[2]
    return headers.get("x-api-key")


class HostCheck:
    """Refuses names that a hostile page may have bound to this address (DNS rebinding).

    IP addresses cannot be rebound; `localhost` and this machine's name are ours.
    """

    def __init__(self, names: Iterable[str]) -> None:
        own = socket.gethostname().lower()
        self._names = {"localhost", own, *(name.lower() for name in names)}

    def accepts(self, host: str) -> bool:
        name = _without_port(host).lower().rstrip(".")
        if name in self._names or "*" in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rpartition(":")[0] if ":" in host else host


class Guard:
    """The middleware.

    Args:
        app: what it guards.
        settings: allowed hosts and origins, and the cap on bodies.
        keys: the API keys.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: KeyRing) -> None:
        self.app, self.keys = app, keys
        self.hosts = HostCheck(settings.allowed_hosts)
        self.origins = frozenset(settings.allowed_origins)
        self.body_bytes = settings.caps.body_bytes
        self.body_seconds = settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _counted(scope, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and (origin in self.origins or "*" in self.origins)
        try:
            self._check_origin(scope, headers, origin, allowed)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                response = Response(status_code=204, headers=_preflight(headers))
                await response(scope, receive, _with_origin(send, origin))
                return
            self._check_key(scope["path"], headers)
            self._check_length(headers)
        except ApiError as error:
            body = error_body(scope["path"], error)
            refusal = JSONResponse(body, status_code=error.status, headers=error.headers)
            await refusal(scope, receive, _with_origin(send, origin) if allowed else send)
            return
        send = _with_origin(send, origin) if allowed else send
        await self.app(scope, _capped(receive, self.body_bytes, self.body_seconds), send)

    def _check_origin(
        self, scope: Scope, headers: Headers, origin: str | None, allowed: bool
    ) -> None:
        host = headers.get("host", "")
        if scope["path"] in OPEN_PATHS and origin is None:
            return
        if not self.hosts.accepts(host):
            message = f"host {host[:200]!r} is not allowed; see --allowed-host"
            raise ApiError(403, message)
        if origin is None:
            # What a page elsewhere embeds, an image or a script, comes without an origin.
            site = headers.get("sec-fetch-site", "none")
            if site in ("none", "same-origin") or scope["path"] in _PAGES:
                return
            raise ApiError(403, f"a page of another site ({site[:20]!r}) may not ask for this")
        if allowed or origin == f"{scope['scheme']}://{host}":
            return
        raise ApiError(403, f"origin {origin[:200]!r} is not allowed; see --allowed-origin")

    def _check_key(self, path: str, headers: Headers) -> None:
        if path in OPEN_PATHS or not self.keys:
            return
        key = presented_key(headers)
        if key is not None and self.keys.accepts(key):
            return
        message = "this API key is not known" if key else "an API key is needed"
        asks = {"WWW-Authenticate": 'Basic realm="greenroom", Bearer'}
        raise ApiError(401, message, code="invalid_api_key", headers=asks)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.body_bytes:
            raise _too_large(int(length), self.body_bytes)


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes or more, at most {limit}")


def _capped(receive: Receive, limit: int, seconds: float) -> Receive:
    """Counts what comes without a Content-Length, and does not wait for a body for ever."""
    total, complete = 0, False

    async def counted() -> Message:
        nonlocal total, complete
        if complete:  # what comes now is the news that the client has left
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), seconds)
        except TimeoutError:
            raise ApiError(408, f"nothing more of the body came for {seconds:g} s") from None
        complete = not message.get("more_body", False)
        total += len(message.get("body", b""))
        if total > limit:
            raise _too_large(total, limit)
        return message

    return counted


def _preflight(headers: Headers) -> dict[str, str]:
    asked = headers.get("access-control-request-headers", "")
    if not _HEADER_NAMES.fullmatch(asked):
        asked = "authorization, content-type"
    return {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": asked[:1000],
        "Access-Control-Max-Age": "600",
    }


def _counted(scope: Scope, send: Send) -> Send:
    """Counts refusals."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
            metrics = scope["app"].state.server.metrics
            metrics.rejected.labels(str(message["status"])).inc()
        await send(message)

    return sending


def _with_origin(send: Send, origin: str | None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and origin:
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return sending
