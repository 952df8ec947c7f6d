"""The server's own settings: who may ask, how much, and for how long. Frozen; built once by
`greenroom serve` or a test. Knows nothing of models.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Limits of one request. A request beyond one is refused with both numbers."""

    body_bytes: int = 8 << 20
    values: int = 1 << 16  # texts, lists and objects in a body
    numbers: int = 1 << 18  # in a body
    choices: int = 16  # prompts x n of one request
    prompts: int = 256  # prompts of one completions or embeddings request
    schema_bytes: int = 128 << 10  # JSON schema or grammar text
    compile_seconds: float = 10.0  # to turn a schema into a grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server behaves.

    Args:
        caps: limits of one request.
        queue: requests that may wait beyond those the engine runs at once; more get 429.
        allowed_hosts: names that a Host header may carry besides IP addresses, `localhost`
            and this machine's own name.
        allowed_origins: web origins (`https://example.org`) that may call from a browser.
        keep_alive: seconds a model stays loaded without requests; None means for ever.
        max_loaded: models that may be loaded at once.
        drain_seconds: how long running requests may go on after SIGTERM.
        workers: threads for tokenising, rendering and grammars.
        body_seconds: longest wait for the next piece of a request's body.
        first_event_seconds: how long a stream's head is held back, so that an early
            error still becomes an HTTP status.
        ping_seconds: a stream that is silent this long gets a comment, so that proxies
            keep it open.
    """

    caps: Caps = Caps()
    queue: int = 64
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    keep_alive: float | None = None
    max_loaded: int = 1
    drain_seconds: float = 30.0
    workers: int = 2
    body_seconds: float = 30.0
    first_event_seconds: float = 0.5
    ping_seconds: float = 15.0
