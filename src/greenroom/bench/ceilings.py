"""Measures the rates of a machine: DRAM, CPU kernels, PCIe, VRAM, disk. See `MachineProfile`.

Knows native kernels, torch's copies and files; no model and no engine.
"""

import contextlib
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from greenroom import native
from greenroom.bench import kernels
from greenroom.bench.prediction import host_seconds, profile_of
from greenroom.experts.slabs import Bytes, allocate
from greenroom.layers import native_ops
from greenroom.placement.calibrate import SCORED, MachineProfile
from greenroom.placement.cpu_seconds import DENSITY
from greenroom.placement.machine import Machine

Tell = Callable[[str], None]

MIB = 1 << 20
_FULL_FORMATS = ("MXFP4", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "F16", "F32")
_QUICK_FORMATS = ("MXFP4", "Q4_K", "Q8_0", "F32")
_BATCH = 512  # tokens of the products that compute rather than read
_ANY, _NARROW, _NARROW_MIB = "Q8_0", (512, 64), 8  # what takes longer does so in every format
_CACHED_MIB = 16  # of weights whose products are timed without waiting for RAM
_HEADS, _SHARED, _KEYS = 32, 8, 16  # of attention; keys of a block
_KEYS_MIB = 128  # of keys and values, more than stays in a cache
_READ_MIB = (4, 16, 64, 256)  # read over and over, besides all there is
_TILES = {"tile_one": 1, "tile_four": 4, "tile_wide": 16, "tile_further": 128}  # tokens
_FINE, _FINE_TIERS = {"tile_two": 2, "tile_eight": 8}, ("avx512", "amx")  # that have tiles of them
_PIECES = (1, 4, 16)  # MiB of a disk read
_READERS = 4  # reads under way at once, as the experts' loader has


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure: formats, MiB of weights, timed runs, MiB read from the disk."""

    formats: tuple[str, ...]
    megabytes: int
    repeats: int
    disk_megabytes: int


def effort(quick: bool, machine: Machine) -> Effort:
    """Enough memory to leave the caches, but never more than an eighth of what is free."""
    room = max(64, machine.memory.available // 8 // MIB)
    if quick:
        return Effort(
            formats=_QUICK_FORMATS, megabytes=min(512, room), repeats=3, disk_megabytes=128
        )
    return Effort(formats=_FULL_FORMATS, megabytes=min(2048, room), repeats=5, disk_megabytes=512)


def measure(
    machine: Machine, quick: bool, folder: Path, small: Sequence[Path], tell: Tell
) -> MachineProfile:
    """Measures everything this machine has; half a minute, or about ten seconds if `quick`.

    Args:
        machine: its facts.
        quick: fewer formats, less memory.
        folder: on the disk to read from; a temporary file is written there.
        small: two tiny models; see `host_seconds`.
        tell: takes a line whenever something begins.
    """
    much = effort(quick, machine)
    rates: dict[str, Any] = {}
    tell(f"memory and kernels, {machine.processor.threads} threads, {much.megabytes} MiB")
    rates |= processor_rates(machine.processor.threads, much)
    tell("steps of tiny models")
    rates |= host_seconds(small, profile_of(rates, machine))
    if torch.cuda.is_available():
        tell("PCIe and VRAM")
        rates |= gpu_rates(much.repeats)
    tell(f"disk of {folder}")
    rates["disk"] = disk_rates(folder, much.disk_megabytes)
    names = [machine.processor.name, *(gpu.name for gpu in machine.gpus[:1])]
    ram = machine.memory
    return MachineProfile(
        fingerprint=machine.fingerprint,
        name=" + ".join(names),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        threads=machine.processor.threads,
        ram=min(ram.total, ram.limit or ram.total),
        gpu=machine.gpus[0].name if machine.gpus else None,
        vram_total=machine.gpus[0].total if machine.gpus else 0,
        **rates,
    )


def processor_rates(threads: int, much: Effort) -> dict[str, Any]:
    """DRAM by threads, instructions on registers, and the kernels of each format."""
    tier = native.lib().tier
    tiles = _TILES | (_FINE if tier in _FINE_TIERS else {})
    plan = kernels.Plan(much.formats, (tier,), (1,), much.repeats, much.megabytes, threads)
    memory = allocate(much.megabytes * MIB)
    memory[:] = 1  # touch every page
    limits = kernels.ceiling(tier, plan, memory)
    found: dict[str, Any] = {
        "dram": limits.read,
        "reads": read_rates(memory, threads),
        "int8": limits.int8,
        "float32": limits.float32,
        "experts": {},
        "dense": {},
        "experts_batch": {},
        **{tile: {} for tile in tiles},
        **attention_rates(threads, much.repeats),
    }
    often = replace(plan, repeats=3 * plan.repeats)
    for name in much.formats:
        bank = kernels.ExpertBank(name, memory)
        found["experts"][name] = kernels.moe_figure(bank, limits, 1, plan).gigabytes
        found["dense"][name] = kernels.linear_figure(bank, limits, 1, plan).gigabytes
        found["experts_batch"][name] = kernels.moe_figure(bank, limits, _BATCH, plan).gigaops
        cached = kernels.ExpertBank(name, memory[: _CACHED_MIB * MIB])
        for tile, tokens in tiles.items():
            found[tile][name] = kernels.linear_figure(cached, limits, tokens, often).gigaops
    return found | narrow_rates(memory, limits, often)


def read_rates(memory: Bytes, threads: int) -> dict[int, float]:
    """GB/s of reading parts of `memory` over and over, by MiB, the fastest of ten times."""
    pool = native.lib().Pool(threads)
    sizes = {*_READ_MIB, memory.nbytes // MIB}
    parts = {size: memory[: size * MIB] for size in sorted(sizes) if size * MIB <= memory.nbytes}
    return {
        size: part.nbytes / 1e9 / min(native.lib().read_seconds(pool, part) for _ in range(10))
        for size, part in parts.items()
    }


def narrow_rates(memory: Bytes, limits: kernels.Ceiling, plan: kernels.Plan) -> dict[str, float]:
    """Seconds of a number that matrices give, from wide and narrow ones, and of one in a norm."""
    d, f = _NARROW
    narrow = kernels.ExpertBank(_ANY, memory[: _NARROW_MIB * MIB], d, f)
    wide = kernels.ExpertBank(_ANY, memory[: _CACHED_MIB * MIB])
    usual = kernels.linear_figure(wide, limits, _BATCH, plan).gigaops * 1e9
    # Twice as many tokens as of a step: what lies between an expert's matrices leaves the cache.
    experts = kernels.moe_figure(narrow, limits, 2 * _BATCH, plan).gigaops * 1e9
    dense = kernels.linear_figure(narrow, limits, _BATCH, plan).gigaops * 1e9
    found = {
        "expert_output_seconds": max(0.0, 1 / experts - 1 / usual) * 6 * f,
        "dense_output_seconds": output_seconds((DENSITY, 2 * d), (usual, dense)),
    }
    pool, x = native.lib().Pool(plan.threads), torch.randn(_BATCH, 2048)
    norm = partial(native_ops.rms_norm, pool, x, torch.ones(2048), 1e-5, torch.zeros_like(x))
    return found | {"norm_seconds": statistics.median(kernels.timed(norm, 20)) / x.numel()}


def output_seconds(densities: tuple[float, float], rates: tuple[float, float]) -> float:
    """Seconds of one number from operations per number and operations per second, of two shapes
    whose operations take the same time."""
    wide, narrow = densities
    return max(0.0, (1 / rates[1] - 1 / rates[0]) / (1 / narrow - 1 / wide))


def attention_rates(threads: int, repeats: int) -> dict[str, float]:
    """GOP/s of the CPU's attention, with heads of 64 and of 128: a prompt of 512 tokens, and one
    token over 512, the keys and values of each call read from RAM."""
    pool, found = native.lib().Pool(threads), {}
    for end, width in (("", 64), ("_wide", 128)):
        shape = (SCORED // _KEYS, _SHARED, _KEYS, width)
        count = _KEYS_MIB * MIB // (4 * math.prod(shape))
        caches = [(torch.ones(shape).half(), torch.ones(shape).half()) for _ in range(count)]
        found[f"attention{end or '_prompt'}"] = _attention(pool, SCORED, caches[:1], repeats)
        found[f"attention_step{end}"] = _attention(pool, 1, caches, repeats)
    return found


def _attention(
    pool: Any, queries: int, caches: Sequence[tuple[torch.Tensor, torch.Tensor]], repeats: int
) -> float:
    """GOP/s of the last `queries` of 512 tokens, from one cache after the other."""
    width, blocks = caches[0][0].shape[3], SCORED // _KEYS
    q = torch.randn(queries, _HEADS, width)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    starts, lengths = (torch.tensor(n, dtype=torch.int32) for n in ([0, queries], [SCORED]))

    def work() -> None:
        for keys, values in caches:
            native_ops.attention(pool, q, keys, values, table, starts, lengths, width**-0.5)

    seconds = statistics.median(kernels.timed(work, 2 * repeats)) / len(caches)
    pairs = SCORED * (SCORED + 1) / 2 if queries > 1 else SCORED
    return pairs * _HEADS * 4 * width / seconds / 1e9


def gpu_rates(repeats: int) -> dict[str, Any]:
    """Pinned copies both ways by size, both at once, VRAM reads, and a large product."""
    up, down = {}, {}
    for megabytes in (1, 4, 16, 64):
        here = torch.empty(megabytes * MIB, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(megabytes * MIB, dtype=torch.uint8, device="cuda")
        copies = max(1, 256 // megabytes)
        size = copies * here.nbytes
        to, back = partial(_copy, there, here), partial(_copy, here, there)
        up[megabytes] = size / 1e9 / _device_seconds(to, copies, repeats)
        down[megabytes] = size / 1e9 / _device_seconds(back, copies, repeats)
    return {
        "pcie_up": up,
        "pcie_down": down,
        "pcie_both": _both_ways(repeats),
        "vram": _vram_rate(repeats),
        "gpu_bf16": _product_rate(repeats),
    }


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _device_seconds(work: Callable[[], object], count: int, repeats: int) -> float:
    """Median seconds of `count` calls by the device's own clock."""
    event: Any = torch.cuda.Event  # PyTorch leaves it untyped
    taken: list[float] = []
    for _ in range(repeats + 1):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken[1:])


def _both_ways(repeats: int) -> float:
    """GB/s of copies up and down at once, together."""
    here, back = (torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    there, source = (torch.empty(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    stream: Any = torch.cuda.Stream
    first, second = stream(), stream()
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            with torch.cuda.stream(first):
                there.copy_(here, non_blocking=True)
            with torch.cuda.stream(second):
                back.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return 8 * here.nbytes / 1e9 / statistics.median(taken[1:])


def _vram_rate(repeats: int) -> float:
    """GB/s read by a matrix-vector product, or moved by a copy if that is more."""
    free, _ = torch.cuda.mem_get_info()
    size = min(1 << 30, free // 8)
    columns = 8192
    matrix = torch.ones(size // 2 // columns, columns, dtype=torch.bfloat16, device="cuda")
    vector = torch.ones(columns, dtype=torch.bfloat16, device="cuda")
    read = matrix.nbytes / _device_seconds(lambda: matrix @ vector, 8, repeats) * 8
    target = torch.empty_like(matrix)
    moved = 2 * matrix.nbytes / _device_seconds(lambda: target.copy_(matrix), 8, repeats) * 8
    return max(read, moved) / 1e9


def _product_rate(repeats: int) -> float:
    """GOP/s of a bfloat16 matrix product."""
    size = 8192 if torch.cuda.mem_get_info()[0] > 4 << 30 else 2048
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 * 4 / _device_seconds(lambda: matrix @ matrix, 4, repeats) / 1e9


def disk_rates(folder: Path, megabytes: int) -> Mapping[int, float]:
    """GB/s of reads around the page cache by MiB of a read; empty if the file system has none.

    Several readers at once, each from its own place, as experts are read.
    """
    direct = getattr(os, "O_DIRECT", 0)
    while not folder.exists():
        folder = folder.parent
    if not direct:
        return {}
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".greenroom-disk-") as file:
            _fill(file.fileno(), megabytes)
            reader = os.open(file.name, os.O_RDONLY | direct)
            try:
                return {
                    piece: megabytes * MIB / 1e9 / _read_seconds(reader, megabytes, piece)
                    for piece in _PIECES
                }
            finally:
                os.close(reader)
    except OSError:  # tmpfs and some network file systems refuse; or no room, or not ours
        return {}


def _fill(file: int, megabytes: int) -> None:
    block = os.urandom(MIB)  # not compressible
    for _ in range(megabytes):
        os.write(file, block)
    os.fsync(file)
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_seconds(file: int, megabytes: int, piece: int) -> float:
    """Seconds to read everything in pieces of `piece` MiB."""
    offsets = range(0, megabytes * MIB, piece * MIB)

    def read(own: range) -> None:
        with mmap.mmap(-1, piece * MIB) as buffer:  # page-aligned, as direct reads need
            for offset in own:
                os.preadv(file, [buffer], offset)

    with ThreadPoolExecutor(_READERS) as pool:
        begin = time.perf_counter()
        list(pool.map(read, [offsets[i::_READERS] for i in range(_READERS)]))
        return time.perf_counter() - begin
