"""Runs an application under uvicorn: socket, TLS, signals, drain. Knows no command line."""

import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from greenroom.errors import GreenroomError, RequestError
from greenroom.server.connection import Connection
from greenroom.server.logs import log_config
from greenroom.server.security import KeyRing

log = logging.getLogger("greenroom.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where and how the server listens.

    Args:
        host, port: the address; port 0 takes a free one.
        certificate, key: PEM files for TLS; both or none.
        log_format: "text" or "json".
        log_level: "debug", "info", "warning" or "error".
        access_log: one line per request.
        drain_seconds: how long running requests may go on after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 11435
    certificate: Path | None = None
    key: Path | None = None
    log_format: str = "text"
    log_level: str = "info"
    access_log: bool = True
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise RequestError("--tls-certificate and --tls-key belong together; give both")
        for file in (self.certificate, self.key):
            if file is not None and not file.is_file():
                raise RequestError(f"{file}: no such file")


def bind(listen: Listen) -> socket.socket:
    """A listening socket.

    Raises:
        RequestError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    # Named as TCP: asyncio turns Nagle's delay off only for sockets that say so, and a small
    # answer then waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listen.host, listen.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        where = f"{listen.host}:{listen.port}"
        raise RequestError(f"cannot listen on {where}: {error.strerror or error}") from None
    return listener


class _Server(uvicorn.Server):
    """Refuses new work from the first SIGTERM on, lets running work end, and says so."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._announce = app, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        server = getattr(self._app.state, "server", None)
        if server is not None:
            server.runner.draining = True
        super().handle_exit(sig, frame)


def _reload_on_hangup(keys: KeyRing) -> None:
    def reload(number: int, frame: Any) -> None:
        try:
            log.info("API keys: %d", keys.reload())
        except GreenroomError as error:
            log.error("API keys stay as they were: %s", error)

    with contextlib.suppress(AttributeError, ValueError):  # no SIGHUP, or not the main thread
        signal.signal(signal.SIGHUP, reload)


def _exit_quietly_on_sigterm() -> None:
    """uvicorn raises the signal again once it has shut down; then there is nothing to do."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda number, frame: None)


def run(app: FastAPI, listen: Listen, keys: KeyRing, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        app: from `create_app`.
        listen: where.
        keys: read again on SIGHUP.
        announce: takes the server's URL once it accepts requests.

    Raises:
        RequestError: the address cannot be bound.
    """
    with bind(listen) as listener:
        port = listener.getsockname()[1]
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        url = f"{'https' if listen.certificate else 'http'}://{host}:{port}"
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=log_config(listen.log_format, listen.log_level),
            access_log=listen.access_log,
            ssl_certfile=listen.certificate,
            ssl_keyfile=listen.key,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(listen.drain_seconds)),
        )
        if listen.host not in ("127.0.0.1", "::1", "localhost") and not keys:
            log.warning("%s can be reached from other machines and has no API keys", url)
        _reload_on_hangup(keys)
        _exit_quietly_on_sigterm()
        # What is there now stays. The collector need not look through it again and again: with a
        # large vocabulary that holds everything up for 0.2 s.
        gc.collect()
        gc.freeze()
        _Server(config, app, lambda: announce(url)).run(sockets=[listener])
