"""How an engine is set up. `EngineConfig` is what a user writes, None meaning "you choose";
`resolve` turns it into a complete one for a model and this machine. Builds nothing.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from greenroom import native
from greenroom.errors import BudgetError, RequestError
from greenroom.placement.budget import parse_size
from greenroom.placement.machine import container_free
from greenroom.placement.sizes import CacheShape

_KV_SHARE = 0.25  # of the RAM that is free beside the model
_LEAST_CONTEXT = 2048  # tokens; a shorter one is never chosen for lack of RAM
_CHUNK = 512  # prompt tokens of a step on the CPU, where longer ones gain nothing
_MOST = {  # beyond these the tables of blocks, or one block, would be what fills the RAM
    "context_length": 2**25,
    "max_sequences": 1024,
    "prefill_chunk": 2**25,
    "block_size": 2**14,
    "cache_tokens": 2**36,
    "threads": 1024,
}
_KV_TYPES = ("f16", "f32")
_BACKENDS = ("auto", "cuda", "native", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Args:
        context_length: most tokens of one request, prompt and answer; None takes the
            model's own, or less where its cache would take more than a quarter of free RAM.
        max_sequences: requests computed at the same time; others wait.
        prefill_chunk: most prompt tokens per step; decodes wait at most for one such chunk.
            None takes 512 on the CPU, and on a GPU up to 8192, as the budget allows.
        block_size: tokens per cache block, the unit of prefix reuse.
        cache_tokens: tokens the KV cache holds, all requests and reusable prefixes
            together; None takes what fits.
        prefix_cache: reuse keys and values of earlier requests with the same beginning.
        prefix_ram: RAM for prefixes that had to leave the cache, in bytes or like "4GiB"; they
            are copied back when a request begins with them again.
        kv_type: "f16" or "f32" keys and values.
        threads: threads that compute; None takes one per physical core this process may use.
        backend: "auto" takes the GPU if there is one and the CPU otherwise; "cuda", "native"
            kernels on the CPU, or "reference" for plain float32 torch.
        vram: budget of the GPU's memory beyond the driver's own, in bytes or like "6GiB"; "max"
            or None for all that is free, 0 to leave the GPU alone.
        ram: most RAM for experts, embedding and what else stays off the GPU, in bytes or like
            "24GiB"; "max" or None for all that is free.
        trace: file of recorded routes ('greenroom profile' writes one) whose popular experts
            start in VRAM.
        mmap: compute from the mapped file where the layout allows, instead of copying it.

    Raises:
        RequestError: a value is out of range.
    """

    context_length: int | None = None
    max_sequences: int = 8
    prefill_chunk: int | None = None
    block_size: int = 32
    cache_tokens: int | None = None
    prefix_cache: bool = True
    prefix_ram: str | int = 0
    kv_type: Literal["f16", "f32"] = "f16"
    threads: int | None = None
    backend: Literal["auto", "cuda", "native", "reference"] = "auto"
    vram: str | int | None = None
    mmap: bool = False
    ram: str | int | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is None and name not in ("max_sequences", "block_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                message = f"{name} must be a whole number from 1 to {most}, not {value!r}"
                raise RequestError(message, name)
        if self.kv_type not in _KV_TYPES:
            raise RequestError(f"kv_type must be f16 or f32, not {self.kv_type!r}", "kv_type")
        if self.backend not in _BACKENDS:
            message = f"backend must be one of {', '.join(_BACKENDS)}, not {self.backend!r}"
            raise RequestError(message, "backend")
        for name in ("vram", "ram"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name), name)
        if parse_size(self.prefix_ram, "prefix_ram") is None:
            raise RequestError("prefix_ram must be a size like 4GiB or 0, not 'max'", "prefix_ram")


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """An EngineConfig with nothing left open, and the cache it leads to."""

    context_length: int
    max_sequences: int
    prefill_chunk: int
    block_size: int
    cache_blocks: tuple[int, ...]  # per KV group
    prefix_cache: bool
    prefix_ram: int  # bytes
    kv_type: Literal["f16", "f32"]
    backend: str
    threads: int


def with_threads(config: EngineConfig) -> EngineConfig:
    """The same with the number of threads decided; one core is left to feed a GPU."""
    if config.threads:
        return config
    threads = default_threads()
    return replace(config, threads=max(1, threads - 1) if config.backend == "cuda" else threads)


def resolve(
    config: EngineConfig,
    model_context: int,
    windows: Items[int | None],
    block_bytes: Items[int],
    vram: int | None = None,
) -> ResolvedConfig:
    """Decides what was left open, once the model is in memory.

    Args:
        config: as the user wrote it.
        model_context: tokens the model was made for.
        windows: of each KV group, None for all positions.
        block_bytes: bytes of one block of each group, all its layers together.
        vram: bytes a cache in VRAM may take; None for a cache in RAM.

    Raises:
        BudgetError: the context asked for does not fit.
    """
    size = config.block_size
    groups = list(zip(windows, block_bytes, strict=True))
    full = sum(bytes_ for window, bytes_ in groups if window is None)
    fixed = sum(_window_blocks(config, window) * bytes_ for window, bytes_ in groups if window)
    prefix_ram = parse_size(config.prefix_ram, "prefix_ram") or 0 if config.prefix_cache else 0
    free = available_memory() - prefix_ram
    if prefix_ram and free < 0:
        raise BudgetError(
            f"prefix_ram is {prefix_ram / 2**30:.1f} GiB, but only "
            f"{(free + prefix_ram) / 2**30:.1f} GiB of RAM are free; lower it"
        )
    have = free if vram is None else vram
    room = max(0, int(have * _KV_SHARE) - fixed)
    context, tokens = _lengths(config, model_context, room // full * size if full else None)
    blocks = -(-tokens // size)
    cache_blocks = tuple(
        blocks if window is None else min(blocks, _window_blocks(config, window))
        for window in windows
    )
    need = sum(count * bytes_ for count, bytes_ in zip(cache_blocks, block_bytes, strict=True))
    _check_room(tokens, need, have, "RAM" if vram is None else "VRAM")
    return ResolvedConfig(
        context_length=context,
        max_sequences=config.max_sequences,
        prefill_chunk=config.prefill_chunk or _CHUNK,
        block_size=size,
        cache_blocks=cache_blocks,
        prefix_cache=config.prefix_cache,
        prefix_ram=prefix_ram,
        kv_type=config.kv_type,
        backend=config.backend,
        threads=config.threads or default_threads(),
    )


def fitting_context(config: EngineConfig, model_context: int, token_bytes: int, free: int) -> int:
    """The context `resolve` will choose, known before the model is in memory.

    Args:
        config: as the user wrote it, without a context.
        model_context: tokens the model was made for.
        token_bytes: of the keys and values of all layers without a window.
        free: bytes of RAM once the model is loaded.
    """
    room = max(0, int(free * _KV_SHARE))
    return _lengths(config, model_context, room // token_bytes if token_bytes else None)[0]


def _lengths(config: EngineConfig, model_context: int, fitting: int | None) -> tuple[int, int]:
    """Context length and tokens of cache; `fitting` tokens take the share of RAM meant for
    them, None if all groups have windows.
    """
    if fitting is None:
        fitting = model_context * config.max_sequences
    context = config.context_length
    if context is None:
        most = config.cache_tokens or model_context
        context = min(model_context, most, max(fitting, _LEAST_CONTEXT))
    tokens = config.cache_tokens or max(context, min(config.max_sequences * context, fitting))
    if tokens < context:
        raise RequestError(
            f"cache_tokens is {tokens}, but one request may have {context}; raise it, or lower "
            "context_length",
            "cache_tokens",
        )
    return context, tokens


def _check_room(tokens: int, need: int, have: int, memory: str) -> None:
    if need > have:
        raise BudgetError(
            f"a KV cache of {tokens} tokens needs {need / 2**30:.1f} GiB, but only "
            f"{have / 2**30:.1f} GiB of {memory} are free; lower context_length or cache_tokens"
        )


def _window_blocks(config: EngineConfig, window: int) -> int:
    shape = CacheShape(config.block_size, config.max_sequences, 0)
    return shape.window_blocks(window, config.prefill_chunk or _CHUNK)


def default_threads() -> int:
    """One per physical core this process may use, within the container's limit."""
    return int(native.lib().default_threads()["threads"])


def available_memory() -> int:
    """Bytes of RAM that can still be used, by the machine and by the container's limit."""
    free, granted = int(psutil.virtual_memory().available), container_free()
    return free if granted is None else min(free, granted)
