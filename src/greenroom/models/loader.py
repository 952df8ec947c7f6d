"""Loads a model: picks the family by `general.architecture` and hands it the file's tensors.

Knows the registry and the options; what a family computes stands in its own file.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from greenroom.errors import UnsupportedModelError
from greenroom.experts.shelf import Shelf
from greenroom.gguf import GGUFFile
from greenroom.layers.backend import Backend, ReferenceBackend
from greenroom.layers.ledger import SCRATCH_BYTES, Ledger
from greenroom.models.config import ModelConfig
from greenroom.models.model import Model
from greenroom.models.parts import Parts
from greenroom.models.registry import place_of, read_config
from greenroom.models.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        backend: "native" (packed weights, SIMD kernels), "cuda" (dense parts on a GPU, experts
            on the native kernels) or "reference" (float32 torch).
        device: torch device of the cuda backend; "cpu" runs it under Triton's interpreter.
        vram: bytes the cuda backend may allocate for weights, cache and scratch; None for all.
        layers_on_gpu: the last so many layers are the cuda backend's, the rest the native
            one's; None for all.
        head_on_gpu: whether the cuda backend computes the head.
        scratch_bytes: of the vram, for rows expanded to float32.
        slot_bytes: of the vram, for experts; 0 leaves all of them to the CPU.
        staging_bytes: of the vram, for experts on their way through it in long steps; 0 leaves
            those to the CPU.
        chunk: most tokens of a step; 0 if that is not known.
        trace: file of recorded routes; its popular experts start in the slots.
        threads: of the native pool; None for as many as suit the machine.
        pool: a native pool to share, instead of `threads`.
        context_length: tokens of a session, None for the model's own.
        mmap: leave in the mapped file what can stay there.
        llama_cpp_math: follow llama.cpp where it differs from the publisher.
        shelf: experts of an earlier model on the same file, which need not be packed again.
        progress: called with (bytes done, bytes in all).
        preparing: called once the weights are read, before a GPU is made ready.
    """

    backend: str = "native"
    device: str = "cuda"
    vram: int | None = None
    layers_on_gpu: int | None = None
    head_on_gpu: bool = True
    scratch_bytes: int = SCRATCH_BYTES
    slot_bytes: int = 0
    staging_bytes: int = 0
    chunk: int = 0
    trace: str | PathLike[str] | None = None
    threads: int | None = None
    pool: Any = None
    context_length: int | None = None
    mmap: bool = False
    llama_cpp_math: bool = False
    shelf: Shelf | None = None
    progress: Callable[[int, int], None] | None = None
    preparing: Callable[[], None] | None = None


def load_model(file: GGUFFile, options: LoadOptions | None = None) -> Model:
    """Loads every tensor of an open file.

    Raises:
        ModelFileError: a tensor is missing, left over or of the wrong shape.
        UnsupportedModelError: the architecture or an option of it is not implemented.
    """
    options = options or LoadOptions()
    family = find_family(file)
    config = read_config(file)
    if options.trace is not None and options.backend != "cuda":
        read_heat(options.trace, config)  # without VRAM nothing uses it; a wrong one is said
    tensors = Tensors(file, options.progress)
    backends = make_backends(options, config)
    parts = Parts(
        tensors=tensors,
        config=config,
        backend=backends[0],
        centred=family.traits.centred and not options.llama_cpp_math,
        blocks=backends[:-1],
        ending=backends[-1],
    )
    context = options.context_length or config.context_length
    model = family(config, parts, context, options.llama_cpp_math)
    tensors.finish()
    if options.preparing is not None and options.backend == "cuda":
        options.preparing()
    for backend in {id(b): b for b in backends}.values():
        backend.complete()
    return model


def find_family(file: GGUFFile) -> type[Model]:
    """The class of the file's architecture."""
    module, name = place_of(file).split(":")
    found: type[Model] = getattr(importlib.import_module(module), name)
    return found


def make_backends(options: LoadOptions, config: ModelConfig) -> list[Backend]:
    """The backend of each layer, and of the head as the last; mostly one and the same."""
    first, count = make_backend(options, config), config.layers + 1
    layers = config.layers if options.layers_on_gpu is None else options.layers_on_gpu
    if options.backend != "cuda" or (layers >= config.layers and options.head_on_gpu):
        return [first] * count
    from greenroom.layers.native_backend import NativeBackend

    cpu = NativeBackend(first.pool, options.mmap, options.shelf)
    backends: list[Backend] = [cpu] * (config.layers - layers) + [first] * layers
    return [*backends, first if options.head_on_gpu else cpu]


def make_backend(options: LoadOptions, config: ModelConfig) -> Any:
    """The backend the options name."""
    if options.backend == "reference":
        return ReferenceBackend()
    if options.backend in ("native", "cuda"):
        # Imported here: the reference needs no compiled extension.
        from greenroom.layers.native_backend import NativeBackend
        from greenroom.layers.native_ops import new_pool

        pool = new_pool(options.threads) if options.pool is None else options.pool
        if options.backend == "cuda":
            return make_cuda_backend(pool, options, config)
        return NativeBackend(pool, options.mmap, options.shelf)
    raise UnsupportedModelError(
        f"backend {options.backend!r} is not implemented; implemented: cuda, native, reference"
    )


def make_cuda_backend(pool: Any, options: LoadOptions, config: ModelConfig) -> Backend:
    """Dense parts on `options.device`, booked against `options.vram`."""
    import torch

    # Imported here: nothing else needs Triton.
    from greenroom.experts.tiers import Tiers
    from greenroom.layers.cuda_backend import CudaBackend
    from greenroom.layers.device_parts import Workbench

    ledger = Ledger(torch.device(options.device), options.vram)
    bench = Workbench(pool, ledger, options.scratch_bytes)
    shape = config.attention
    heat = None if options.trace is None else read_heat(options.trace, config)
    used = 0 if config.moe is None else config.moe.used
    sizes = options.slot_bytes, options.staging_bytes
    tiers = Tiers(bench.ledger, *sizes, heat, used, options.chunk)
    per = shape.heads // shape.kv_heads
    return CudaBackend(pool, bench, per, options.mmap, tiers=tiers, shelf=options.shelf)


def read_heat(path: str | PathLike[str], config: ModelConfig) -> Any:
    """How much each expert was in demand in a trace, (moe layers, experts) float64.

    Raises:
        ModelFileError: the file is no trace, or one of another model.
    """
    from greenroom.experts.trace import Trace

    trace = Trace.load(path)
    if config.moe is not None:
        layers = range(config.moe.dense_layers, config.layers)
        trace.fits(config.moe.experts, layers, path)
    return trace.heat()
