"""Packed weights in memory: huge pages, one matrix, and the layout of one expert's slab.

A slab is gate | up | down, each packed as in docs/slab-layout.md, then float32 biases; all
experts of a layer have one size and one layout. Knows bytes and types, not routing.
"""

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from greenroom import native
from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType, dequantize, quantize, repack_pairs

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

HUGE_PAGE = 2 << 20
LINE = 64  # alignment of everything inside a slab

log = logging.getLogger(__name__)


class RawMatrices(Protocol):
    """One matrix of every expert as a file stores it; `layers.weight.Weight` is one.

    `raw[e]` is (rows, row_bytes) uint8, so a stack or a list of arrays will do.
    """

    @property
    def name(self) -> str:
        """The tensor's name, for messages."""

    @property
    def type(self) -> GGMLType:
        """The blocks' format."""

    @property
    def raw(self) -> Sequence[Bytes] | Bytes:
        """The rows of each expert."""


@dataclass(frozen=True, slots=True)
class SplitMatrices:
    """`RawMatrices` of a file with one tensor per expert."""

    name: str
    type: GGMLType
    raw: Sequence[Bytes]


@dataclass(frozen=True, slots=True)
class MixedMatrices:
    """`RawMatrices` whose experts have types of their own; `type` is that of the first."""

    name: str
    types: tuple[GGMLType, ...]
    raw: Sequence[Bytes]

    @property
    def type(self) -> GGMLType:
        """Of expert 0."""
        return self.types[0]


def type_of(matrices: RawMatrices, expert: int) -> GGMLType:
    """The format of one expert's blocks."""
    return matrices.types[expert] if isinstance(matrices, MixedMatrices) else matrices.type


def allocate(nbytes: int) -> Bytes:
    """Zeroed memory of its own, on huge pages where the system grants them: (nbytes,) uint8.

    With 4 KiB pages a matrix-vector product spends up to a third of its time on address
    translation (docs/slab-layout.md).
    """
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE if nbytes >= HUGE_PAGE else max(nbytes, 1)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8, nbytes)


@cache
def native_types() -> frozenset[int]:
    """Numbers of the types that have kernels."""
    return frozenset(native.lib().native_types())


def stored_type(type: GGMLType, cols: int) -> GGMLType:
    """The format a matrix is kept in: its own where there are kernels, else one close to it.

    Types without kernels become Q8_0, whose rounding (1/254 of a block's peak) is far below
    that of the types it replaces, or float32 where rows are not whole blocks of 32.
    """
    if int(type) in native_types():
        return type
    if type == GGMLType.MXFP4_PAIRS:
        return GGMLType.MXFP4
    return GGMLType.Q8_0 if cols % 32 == 0 else GGMLType.F32


def stored_rows(name: str, type: GGMLType, raw: Bytes) -> Bytes:
    """The rows in their `stored_type`: (rows, row_bytes) uint8 to the same, contiguous.

    Raises:
        UnsupportedModelError: nothing can decode this type.
    """
    raw = np.ascontiguousarray(raw)
    target = stored_type(type, columns(type, raw))
    if target == type:
        return raw
    if type == GGMLType.MXFP4_PAIRS:
        return repack_pairs(raw)
    try:
        values = dequantize(type, raw)
    except (NotImplementedError, ValueError, UnsupportedModelError):
        raise UnsupportedModelError(
            f"{name} has type {type.name}, which cannot be decoded; "
            "get the model in another quantisation, for example Q4_K_M"
        ) from None
    return np.ascontiguousarray(quantize(target, values).view(np.uint8))


def columns(type: GGMLType, raw: Bytes) -> int:
    """Elements per row of (..., row_bytes) uint8."""
    return int(raw.shape[-1]) // type.block_bytes * type.block_size


def note_requantised(name: str, type: GGMLType, cols: int) -> None:
    """Logs, once per tensor, that a matrix is not kept in the type the file has."""
    target = stored_type(type, cols)
    if target != type and type != GGMLType.MXFP4_PAIRS:
        log.warning("%s: no kernels for %s, requantised to %s", name, type.name, target.name)


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed matrix: `data` is (packed_bytes,) uint8."""

    type: GGMLType
    rows: int
    cols: int
    data: Bytes


class Packer:
    """Packs matrices side by side, many in one native call: each call ends with threads that wait
    for others, and begins with waiting for the interpreter.

    Args:
        pool: the native thread pool.
    """

    AT_ONCE = 256 << 20  # bytes: a call lasts no longer than somebody waits after Ctrl-C

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._waiting: list[tuple[int, int, int, Bytes, Bytes]] = []
        self._bytes = 0

    def add(self, name: str, type: GGMLType, raw: Bytes, into: Bytes | None = None) -> Packed:
        """Packs one matrix, (rows, row_bytes) uint8, into new memory or the given one; it is there
        after `flush`."""
        rows, cols = raw.shape[0], columns(type, raw)
        target = stored_type(type, cols)
        if into is None:
            note_requantised(name, type, cols)
            into = allocate(native.lib().packed_bytes(int(target), rows, cols))
        source = stored_rows(name, type, raw).reshape(-1)
        self._waiting.append((int(target), rows, cols, source, into))
        self._bytes += source.nbytes
        if self._bytes >= self.AT_ONCE or target != type:  # do not collect copies
            self.flush()
        return Packed(target, rows, cols, into)

    def flush(self) -> None:
        """Returns when all is packed."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        native.lib().pack_all(self._pool, waiting)


def copied(pool: Any, raw: Bytes) -> Bytes:
    """A copy of any bytes that lie in one piece, in memory as of `allocate`."""
    copy = allocate(raw.nbytes)
    native.lib().copy(pool, raw.reshape(-1), copy)
    return copy.reshape(raw.shape)


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """Where the parts of one expert lie, in bytes from the slab's start.

    Attributes:
        d, f: model width and hidden width.
        types: of gate, up, down.
        matrices: (start, stop) of gate, up, down.
        biases: (start, stop) of their float32 biases, or None.
        nbytes: of the slab.
    """

    d: int
    f: int
    types: tuple[GGMLType, GGMLType, GGMLType]
    matrices: tuple[tuple[int, int], ...]
    biases: tuple[tuple[int, int], ...] | None
    nbytes: int

    @staticmethod
    def plan(
        types: tuple[GGMLType, GGMLType, GGMLType], d: int, f: int, biases: bool
    ) -> "SlabLayout":
        """Lays out gate (f, d), up (f, d) and down (d, f), then the biases if there are any."""
        packed_bytes = native.lib().packed_bytes
        shapes = ((f, d), (f, d), (d, f))
        sizes = [packed_bytes(int(t), r, c) for t, (r, c) in zip(types, shapes, strict=True)]
        if biases:
            sizes += [4 * rows for rows, _ in shapes]
        parts, end = [], 0
        for size in sizes:
            parts.append((end, end + size))
            end += -(-size // LINE) * LINE
        return SlabLayout(d, f, types, tuple(parts[:3]), tuple(parts[3:]) or None, end)

    @property
    def joined(self) -> bool:
        """Whether gate and up are one matrix (2 f, d): up's groups of rows follow gate's."""
        gate, up = self.matrices[:2]
        return self.types[0] == self.types[1] and gate[1] == up[0] and self.f % 16 == 0

    def matrix(self, slab: Bytes, index: int) -> Bytes:
        """Packed gate (0), up (1) or down (2) of a slab."""
        start, stop = self.matrices[index]
        return slab[start:stop]

    def bias(self, slab: Bytes, index: int) -> Floats | None:
        """The bias of gate, up or down: (rows,) float32, or None."""
        if self.biases is None:
            return None
        start, stop = self.biases[index]
        return slab[start:stop].view(np.float32)
