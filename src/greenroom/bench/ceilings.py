"""Measures the rates of a machine: DRAM, CPU kernels, PCIe, VRAM, disk. See `MachineProfile`.

Knows native kernels, torch's copies and files; no model and no engine.
"""

import contextlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from greenroom.placement.calibrate import DENSE_DENSITY, EXPERT_DENSITY, FEW, MachineProfile
from greenroom.placement.machine import Machine

Tell = Callable[[str], None]

MIB = 1 << 20
_FULL_FORMATS = ("MXFP4", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "F16", "F32")
_QUICK_FORMATS = ("MXFP4", "Q4_K", "Q8_0")
_BATCH = 512  # tokens of the products that compute rather than read
_ANY, _NARROW, _NARROW_MIB = "Q8_0", (512, 64), 8  # what takes longer does so in every format
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
    plan = kernels.Plan(much.formats, (tier,), (1,), much.repeats, much.megabytes, threads)
    memory = allocate(much.megabytes * MIB)
    memory[:] = 1  # touch every page
    limits = kernels.ceiling(tier, plan, memory)
    found: dict[str, Any] = {
        "dram": limits.read,
        "int8": limits.int8,
        "float32": limits.float32,
        **{part + size: {} for part in ("experts", "dense") for size in ("", "_few", "_batch")},
        **attention_rates(threads, much.repeats),
    }
    for name in much.formats:
        bank = kernels.ExpertBank(name, memory)
        found["experts"][name] = kernels.moe_figure(bank, limits, 1, plan).gigabytes
        found["dense"][name] = kernels.linear_figure(bank, limits, 1, plan).gigabytes
        each = FEW * min(kernels.EXPERTS, bank.count) // kernels.ROUTES
        found["experts_few"][name] = kernels.moe_figure(bank, limits, each, plan).gigaops
        found["dense_few"][name] = kernels.linear_figure(bank, limits, FEW, plan).gigaops
        found["experts_batch"][name] = kernels.moe_figure(bank, limits, _BATCH, plan).gigaops
        found["dense_batch"][name] = kernels.linear_figure(bank, limits, _BATCH, plan).gigaops
    return found | narrow_rates(memory, limits, plan)


def narrow_rates(memory: Bytes, limits: kernels.Ceiling, plan: kernels.Plan) -> dict[str, float]:
    """Seconds of a number that matrices give, from wide and narrow ones, and of one in a norm."""
    d, f = _NARROW
    pieces = memory[: _NARROW_MIB * MIB]
    wide, narrow = kernels.ExpertBank(_ANY, memory), kernels.ExpertBank(_ANY, pieces, d, f)
    densities = {
        "expert": (kernels.moe_figure, EXPERT_DENSITY, 6 * d * f / (2 * f + d)),
        "dense": (kernels.linear_figure, DENSE_DENSITY, 2 * d),
    }
    found = {}
    for name, (figure, usual, less) in densities.items():
        rates = [figure(bank, limits, _BATCH, plan).gigaops * 1e9 for bank in (wide, narrow)]
        found[f"{name}_output_seconds"] = output_seconds((usual, less), (rates[0], rates[1]))
    pool, x = native.lib().Pool(plan.threads), torch.randn(_BATCH, 2048)
    norm = partial(native_ops.rms_norm, pool, x, torch.ones(2048), 1e-5, torch.zeros_like(x))
    return found | {"norm_seconds": statistics.median(kernels.timed(norm, 20)) / x.numel()}


def output_seconds(densities: tuple[float, float], rates: tuple[float, float]) -> float:
    """Seconds of one number from operations per number and operations per second, of two shapes
    whose operations take the same time."""
    wide, narrow = densities
    return max(0.0, (1 / rates[1] - 1 / rates[0]) / (1 / narrow - 1 / wide))


def attention_rates(threads: int, repeats: int) -> dict[str, float]:
    """GOP/s of the CPU's attention: a prompt of 512 tokens, and one token over 512."""
    heads, shared, width, size, tokens = 32, 8, 64, 16, 512
    pool, blocks = native.lib().Pool(threads), tokens // size
    keys, values = (torch.randn(blocks, shared, size, width).half() for _ in range(2))
    table = torch.arange(blocks, dtype=torch.int32)[None]
    found = {}
    for name, queries in (("attention_prompt", tokens), ("attention_step", 1)):
        q = torch.randn(queries, heads, width)
        starts = torch.tensor([0, queries], dtype=torch.int32)
        lengths = torch.tensor([tokens], dtype=torch.int32)
        work = partial(
            native_ops.attention, pool, q, keys, values, table, starts, lengths, width**-0.5
        )
        pairs = tokens * (tokens + 1) / 2 if queries > 1 else tokens
        seconds = statistics.median(kernels.timed(work, 4 * repeats))
        found[name] = pairs * heads * 4 * width / seconds / 1e9
    return found


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
