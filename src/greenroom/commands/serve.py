"""`greenroom serve`: models over HTTP. Every option has an environment variable and a key in
the TOML file; the command line goes before the environment, and that before the file.
"""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from greenroom.server.launch import Listen
    from greenroom.server.settings import ServerSettings
    from greenroom.server.source import ModelSource


def _option(variable: str, text: str, **more: Any) -> Any:
    """An option that may also come from `GREENROOM_<variable>`."""
    return Option(help=text, envvar=f"GREENROOM_{variable}", **more)


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the TOML file's values the defaults of all other options."""
    if file is None:
        return None
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise typer.BadParameter(f"{file}: {error}") from None
    known = {parameter.name for parameter in context.command.params}
    defaults = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise typer.BadParameter(f"{file}: unknown key {unknown[0]!r}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


Models = Annotated[
    list[str] | None,
    Argument(help="Files, folders or names of models; none: all that 'greenroom list' shows."),
]
Config = Annotated[
    Path | None, _option("CONFIG", "TOML file.", is_eager=True, callback=_read_config)
]
Host = Annotated[str, _option("HOST", "Address to listen on.")]
Port = Annotated[int, _option("PORT", "Port; 0: a free one.", min=0, max=65535)]
ModelsDir = Annotated[list[Path] | None, _option("MODELS_DIR", "A further folder of models.")]
MaxLoaded = Annotated[int, _option("MAX_LOADED", "Models loaded at once.", min=1)]
KeepAlive = Annotated[
    float, _option("KEEP_ALIVE", "Seconds a model stays loaded unused; 0: for ever.", min=0)
]
Preload = Annotated[bool, _option("PRELOAD", "Load the first model at start.")]
ApiKey = Annotated[list[str] | None, _option("API_KEY", "A key that clients must send.")]
ApiKeyFile = Annotated[
    Path | None, _option("API_KEY_FILE", "File of keys, one a line; read again on SIGHUP.")
]
AllowedHost = Annotated[list[str] | None, _option("ALLOWED_HOST", "Further Host name to accept.")]
AllowedOrigin = Annotated[
    list[str] | None, _option("ALLOWED_ORIGIN", "Web origin that may call from a browser.")
]
TlsCertificate = Annotated[Path | None, _option("TLS_CERTIFICATE", "PEM file.")]
TlsKey = Annotated[Path | None, _option("TLS_KEY", "PEM file.")]
Queue = Annotated[int, _option("QUEUE", "Sequences that may wait; more get 429.", min=0)]
MaxBody = Annotated[int, _option("MAX_BODY", "Largest request body, bytes.", min=1024)]
MaxChoices = Annotated[int, _option("MAX_CHOICES", "Largest n of a request.", min=1)]
DrainSeconds = Annotated[
    float, _option("DRAIN_SECONDS", "Time that running requests have after SIGTERM.", min=0)
]
Context = Annotated[int | None, _option("CONTEXT", "Context in tokens.  [default: what fits]")]
MaxSequences = Annotated[int, _option("MAX_SEQUENCES", "Sequences computed at once.", min=1)]
CacheTokens = Annotated[
    int | None, _option("CACHE_TOKENS", "Tokens in the KV cache.  [default: what fits]")
]
PrefixRam = Annotated[
    str, _option("PREFIX_RAM", "RAM for prefixes that leave the KV cache, such as 4GiB.")
]
Vram = Annotated[
    str | None, _option("VRAM", "GPU memory: 6GiB, max, or 0: the CPU only.  [default: max]")
]
Ram = Annotated[
    str | None, _option("RAM", "RAM a model may take: 24GiB or max.  [default: what is free]")
]
Reference = Annotated[bool, _option("REFERENCE", "Plain float32 torch: slow, exact.")]
KvType = Annotated[str, _option("KV_TYPE", "Keys and values as f16 or f32.")]
Threads = Annotated[int | None, _option("THREADS", "Computing threads.  [default: physical cores]")]
Mmap = Annotated[bool, _option("MMAP", "Compute from the mapped file where possible.")]
LogFormat = Annotated[str, _option("LOG_FORMAT", "text or json.")]
LogLevel = Annotated[str, _option("LOG_LEVEL", "debug, info, warning or error.")]
AccessLog = Annotated[bool, _option("ACCESS_LOG", "Log a line per request.")]


def serve(
    ctx: typer.Context,
    models: Models = None,
    config: Config = None,
    host: Host = "127.0.0.1",
    port: Port = 11435,
    models_dir: ModelsDir = None,
    max_loaded: MaxLoaded = 1,
    keep_alive: KeepAlive = 0,
    preload: Preload = True,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allowed_host: AllowedHost = None,
    allowed_origin: AllowedOrigin = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    queue: Queue = 64,
    max_body: MaxBody = 8 << 20,
    max_choices: MaxChoices = 16,
    drain_seconds: DrainSeconds = 30.0,
    context: Context = None,
    max_sequences: MaxSequences = 8,
    cache_tokens: CacheTokens = None,
    prefix_ram: PrefixRam = "0",
    kv_type: KvType = "f16",
    vram: Vram = None,
    ram: Ram = None,
    reference: Reference = False,
    threads: Threads = None,
    mmap: Mmap = False,
    log_format: LogFormat = "text",
    log_level: LogLevel = "info",
    access_log: AccessLog = False,
) -> None:
    """Serve models over OpenAI-, Anthropic- and Ollama-compatible APIs.

    Options may also come from GREENROOM_* variables or a TOML file.
    """
    start(ctx.params)


def start(values: dict[str, Any]) -> None:
    """Serves until it is told to stop; `values` are the command's parameters by name."""
    from greenroom.server.app import create_app
    from greenroom.server.launch import run
    from greenroom.server.registry import Registry
    from greenroom.server.security import KeyRing
    from greenroom.server.stores import select

    settings, listen = server_settings(values), listening(values)
    keys = KeyRing(values["api_key"] or (), values["api_key_file"])
    sources = select(values["models"] or (), values["models_dir"] or ())
    load = _loader(values)
    first = _preloaded(load, sources[0]) if values["preload"] and sources else None

    def registry() -> Registry:
        found = Registry(sources, load, settings)
        if first is not None:
            found.adopt(sources[0].name, first)
        return found

    app = create_app(registry, settings, keys)

    def announce(url: str) -> None:
        names = ", ".join(source.name for source in sources[:3])
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        typer.echo(f"Greenroom serves {names or 'no model yet'}{more} at {url}", err=True)

    run(app, listen, keys, announce)


def server_settings(values: dict[str, Any]) -> "ServerSettings":
    """The server's settings of the command's parameters."""
    from greenroom.server.settings import Caps, ServerSettings

    return ServerSettings(
        caps=Caps(body_bytes=values["max_body"], choices=values["max_choices"]),
        queue=values["queue"],
        allowed_hosts=tuple(values["allowed_host"] or ()),
        allowed_origins=tuple(values["allowed_origin"] or ()),
        keep_alive=values["keep_alive"] or None,
        max_loaded=values["max_loaded"],
        drain_seconds=values["drain_seconds"],
    )


def listening(values: dict[str, Any]) -> "Listen":
    """Where to listen, of the command's parameters."""
    from greenroom.server.launch import Listen

    return Listen(
        host=values["host"],
        port=values["port"],
        certificate=values["tls_certificate"],
        key=values["tls_key"],
        log_format=values["log_format"],
        log_level=values["log_level"],
        access_log=values["access_log"],
        drain_seconds=values["drain_seconds"],
    )


def _loader(values: dict[str, Any]) -> Any:
    """What turns a source into an engine; engine options are checked now, not on first use."""
    from greenroom.engine.config import EngineConfig

    config = EngineConfig(
        context_length=values["context"],
        max_sequences=values["max_sequences"],
        cache_tokens=values["cache_tokens"],
        prefix_ram=values["prefix_ram"],
        kv_type=values["kv_type"],
        vram=values["vram"],
        ram=values["ram"],
        backend="reference" if values["reference"] else "auto",
        threads=values["threads"],
        mmap=values["mmap"],
    )

    def load(source: "ModelSource", *, progress: Any = None, preparing: Any = None) -> Any:
        from greenroom.engine.load import load_engine

        assert source.path is not None
        return load_engine(source.path, config, progress, preparing=preparing)

    return load


def _preloaded(load: Any, source: "ModelSource") -> Any:
    """The engine of a source; a terminal shows how far it is, as nothing else is under way yet."""
    from greenroom.commands.console import loading_shown

    with loading_shown(source.name) as (progress, preparing):
        return load(source, progress=progress, preparing=preparing)
