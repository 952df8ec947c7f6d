"""From a GGUF file to a running engine: model, tokenizer, chat format, cache. The only module
of the engine that knows files; imported when something is loaded, not before.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from greenroom.engine.config import (
    EngineConfig,
    available_memory,
    fitting_context,
    resolve,
    with_threads,
)
from greenroom.engine.engine import Engine
from greenroom.engine.planning import planned
from greenroom.engine.prefix_store import PrefixStore
from greenroom.engine.runner import ModelLike
from greenroom.errors import BudgetError
from greenroom.gguf import GGUFFile
from greenroom.placement.budget import mib, parse_size
from greenroom.placement.enforce import limit
from greenroom.tokenizer import Tokenizer

if TYPE_CHECKING:
    from greenroom.experts.shelf import Shelf
    from greenroom.models import LoadOptions
    from greenroom.models.config import ModelConfig
    from greenroom.placement.placement import Placement
    from greenroom.tokenizer import ChatFormat

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_TYPES = {"f16": torch.float16, "f32": torch.float32}


def load_engine(
    path: str | os.PathLike[str],
    config: EngineConfig | None = None,
    progress: Progress | None = None,
    shelf: "Shelf | None" = None,
    preparing: Callable[[], None] | None = None,
) -> Engine:
    """Loads a model file and starts an engine on it.

    Args:
        path: a GGUF file, or the first of a split set.
        config: settings; None for the defaults.
        progress: called with bytes done and bytes in all while weights are loaded.
        shelf: keeps the packed experts for the next engine on this file; the one before must be
            closed.
        preparing: called once the weights are read, if a GPU is made ready then; that takes up to
            some seconds, the first time with kernels to compile.

    Raises:
        ModelFileError, UnsupportedModelError, TokenizerError: the file cannot be used.
        BudgetError: the cache does not fit into RAM.
    """
    from greenroom.models import load_model
    from greenroom.models.registry import read_config

    config = config or EngineConfig()
    with GGUFFile(path) as file:
        placement = planned(file, config)
        log.info("%s", placement.reason)
        if placement.backend == "cuda":  # "max" leaves a margin of its own
            limit(placement.vram if config.vram is not None else None)
        if shelf is not None:
            shelf.open(file.path)
        config = _within_ram(config, placement, file, 0 if shelf is None else shelf.nbytes)
        config = _session(_decided(config, placement), read_config(file), file)
        config = with_threads(config)
        _say_if_long(config, read_config(file))
        with ThreadPoolExecutor(1, "tokenizer") as beside, _running_out_said(file.path.name):
            text = beside.submit(_text, file)
            options = _options(file, config, placement, shelf, _unless_failed(text, progress))
            model = load_model(file, replace(options, preparing=preparing))
            tokenizer, chat = text.result()
            model.rehearse()
            engine = assemble(model, tokenizer, config, chat, placement.cache_room)
    engine.placement = placement
    return engine


def _text(file: GGUFFile) -> "tuple[Tokenizer, ChatFormat]":
    """What turns text into tokens. A large vocabulary takes one processor about a second, in which
    the others pack weights."""
    from greenroom.tokenizer import ChatFormat

    tokenizer = Tokenizer.from_gguf(file)
    return tokenizer, ChatFormat.from_gguf(file, tokenizer)


def _unless_failed(beside: Future[Any], progress: Progress | None) -> Progress:
    """`progress`, which raises at once what was raised beside the loading."""

    def told(done: int, total: int) -> None:
        if beside.done():
            beside.result()
        if progress is not None:
            progress(done, total)

    return told


def _options(
    file: GGUFFile,
    config: EngineConfig,
    placement: "Placement",
    shelf: "Shelf | None",
    progress: Progress | None,
) -> "LoadOptions":
    """What was decided, as the loader takes it."""
    from greenroom.models import LoadOptions

    return LoadOptions(
        backend=config.backend,
        threads=config.threads,
        context_length=config.context_length,
        vram=placement.lasting,
        layers_on_gpu=placement.layers_on_gpu,
        head_on_gpu=placement.head_on_gpu,
        scratch_bytes=placement.scratch,
        slot_bytes=placement.slot_bytes,
        staging_bytes=placement.staging,
        chunk=placement.prefill_chunk or 0,
        trace=config.trace,
        mmap=config.mmap,
        shelf=shelf,
        progress=progress,
    )


@contextmanager
def _running_out_said(name: str) -> Iterator[None]:
    """Says it in one line when VRAM runs out, which is planned never to happen."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BudgetError(
            f"{name}: VRAM ran out while loading; another program took some meanwhile: end it, "
            "or lower --vram"
        ) from None


def _decided(config: EngineConfig, placement: "Placement") -> EngineConfig:
    """The settings with what the placement decided."""
    return replace(
        config,
        backend=cast(Any, placement.backend),
        prefill_chunk=placement.prefill_chunk or config.prefill_chunk,
        context_length=config.context_length or placement.context_length,
        cache_tokens=config.cache_tokens or placement.cache_tokens,
    )


def _within_ram(
    config: EngineConfig, placement: "Placement", file: GGUFFile, there: int
) -> EngineConfig:
    """Refuses a model beyond the RAM the user named; leaves one beyond the free RAM in its file.
    Of its experts `there` bytes are in RAM already.

    Raises:
        BudgetError: `config.ram` is too small; the message says what is needed.
    """
    from greenroom.models.registry import read_config
    from greenroom.placement.sizes import Sizes

    if placement.backend == "reference":
        return config
    sizes = Sizes.of(file.tensors, read_config(file))
    first = placement.layers - placement.layers_on_gpu
    need = sizes.experts + sizes.embedding + sum(sizes.layers[:first])
    need += 0 if placement.head_on_gpu else sizes.head
    named, free = parse_size(config.ram or "max", "ram"), available_memory() + there
    if named is not None and need > named:
        raise BudgetError(
            f"ram is {named >> 20} MiB, but experts, embedding and what else stays off the GPU "
            f"need {mib(need)}; raise it, or quantise the model further"
        )
    if need <= free or config.mmap:
        return config
    log.warning(
        "the model needs %s of RAM, but only %d MiB are free: experts stay in the mapped file "
        "until they are used", mib(need), free >> 20,
    )  # fmt: skip
    return replace(config, mmap=True)


def _session(config: EngineConfig, model: "ModelConfig", file: GGUFFile) -> EngineConfig:
    """Decides the context before loading where weights depend on it: longrope has one table for
    sessions up to the original context and another beyond, and cached keys allow no change.
    """
    if model.rope.scaling != "longrope" or config.context_length is not None:
        return config
    free = available_memory() - (0 if config.mmap else file.nbytes)
    value = _TYPES[config.kv_type].itemsize
    context = fitting_context(config, model.context_length, model.cache_bytes(value), free)
    return replace(config, context_length=context)


def _say_if_long(config: EngineConfig, model: "ModelConfig") -> None:
    """Warns of a context beyond what the model has learnt."""
    if (config.context_length or 0) > model.context_length:
        log.warning(
            "a context of %d tokens was asked for, but the model was made for %d: it may make no "
            "sense beyond them", config.context_length, model.context_length,
        )  # fmt: skip


def assemble(
    model: ModelLike,
    tokenizer: Any,
    config: EngineConfig | None = None,
    chat: Any = None,
    vram: int | None = None,
) -> Engine:
    """An engine on a model that is already loaded; `vram`: room for a cache there, in bytes."""
    config = config or EngineConfig()
    dtype = _TYPES[config.kv_type]
    windows = [spec.window for spec in model.kv_groups]
    resolved = resolve(
        config,
        model.config.context_length,
        windows,
        _block_bytes(model, config.block_size, dtype, vram is not None),
        vram,
    )
    # Asked before: it makes caches of a block, for which there is no room beside the real ones.
    layers = _layers_of_groups(model, config.block_size, dtype) if resolved.prefix_ram else []
    caches = model.new_caches(resolved.cache_blocks, resolved.block_size, dtype)
    store = None
    if resolved.prefix_ram:
        tensors = [[t for i in of for t in (caches[i].k, caches[i].v)] for of in layers]
        store = PrefixStore(resolved.prefix_ram, tensors)
    return Engine(model, caches, resolved, tokenizer, chat, store)


def _layers_of_groups(model: ModelLike, block_size: int, dtype: torch.dtype) -> list[list[int]]:
    """For each KV group, the layers whose cache it is."""
    groups = range(len(model.kv_groups))
    found = []
    for group in groups:
        caches = model.new_caches([int(index == group) for index in groups], block_size, dtype)
        found.append([layer for layer, cache in enumerate(caches) if cache.k.shape[0]])
    return found


def _block_bytes(
    model: ModelLike, block_size: int, dtype: torch.dtype, vram: bool = False
) -> list[int]:
    """Bytes of one block of each KV group, over all layers that belong to it.

    With `vram` only the layers whose cache lies there count, where some do and some do not.
    """
    # Asking for one block of a single group at a time leaves no doubt which layers those are.
    groups = len(model.kv_groups)
    blocks_of = getattr(model, "blk", None) if vram else None
    bytes_of = []
    for group in range(groups):
        blocks = [int(index == group) for index in range(groups)]
        caches = model.new_caches(blocks, block_size, dtype)
        if blocks_of is not None:
            pairs = zip(blocks_of, caches, strict=True)
            caches = [cache for blk, cache in pairs if blk.backend.tier]
        bytes_of.append(sum(cache.k.nbytes + cache.v.nbytes for cache in caches))
    return bytes_of
