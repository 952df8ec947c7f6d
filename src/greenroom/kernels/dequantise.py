"""Packed weights to plain row-major floats on the GPU, for products of many tokens: one matrix,
or the same matrix of a group of experts. The scratch it fills is multiplied afterwards. Weights
lie as docs/slab-layout.md says.
"""

import triton.language as tl
from torch import Tensor

from greenroom.kernels.grouped import Group, Routes
from greenroom.kernels.launch import kernel
from greenroom.kernels.lines import Walk
from greenroom.kernels.matvec import iq4_table
from greenroom.kernels.packed import factors

LINES = 32  # lines of 16 words per program


@kernel(do_not_specialize=["first"])
def _dequantise(
    packed,
    out,
    iq4,
    table,
    experts,
    first,
    slab_bytes,
    out_step,
    rows,
    cols,
    group_bytes,
    payload_bytes,
    lines,
    BLOCK_WORDS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    FLOAT: tl.constexpr,
    CODES: tl.constexpr,
    LINES: tl.constexpr,
    SLABS: tl.constexpr,
):
    if SLABS:  # `packed` points into the first slab; the table says whose slab is where
        expert = tl.load(table + first + tl.program_id(2))
        packed += tl.load(table + 2 * experts + expert).to(tl.int64) * slab_bytes
        out += tl.program_id(2).to(tl.int64) * out_step
    group = packed + tl.program_id(0).to(tl.int64) * group_bytes
    row = tl.arange(0, 16)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    at = tl.where(line < lines, line, 0)
    block = at // LOW
    inner = at % LOW
    words = group.to(tl.pointer_type(tl.int32)) + block * BLOCK_WORDS
    word = tl.load(words[:, None] + inner[:, None] * 16 + row[None, :])[:, :, None]
    place = tl.arange(0, CODES)[None, None, :]  # of a column within its word's
    if FLOAT == 3:
        value = word.to(tl.float32, bitcast=True)
    elif FLOAT == 2:
        value = (((word >> (16 * place)) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    elif FLOAT == 1:
        bits = ((word >> (16 * place)) & 0xFFFF).to(tl.uint16)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = inner * (8 // LOW)
        code = (word >> (8 * (place % 4) + LOW * (place // 4))) & ((1 << LOW) - 1)
        if HIGH > 0:
            PER: tl.constexpr = 8 // HIGH
            high = tl.load((words + (LOW + first // PER) * 16)[:, None] + row[None, :])
            high = (high >> ((first % PER) * HIGH)[:, None])[:, :, None]
            high = (high >> (8 * (place % 4) + HIGH * (place // 4))) & ((1 << HIGH) - 1)
            code |= high << LOW
        if TABLE == 1:  # E2M1: its bits moved to where a half has them, times 2^14 for the bias
            bits = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.uint16)
            number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        elif TABLE == 2:
            number = tl.load(iq4 + code)
        else:
            number = (code - ZERO).to(tl.float32)
        part = first // 4 if PARTS == 2 else first * 0
        scale, low = factors(
            group + payload_bytes, block[:, None], row[None, :], part[:, None], SCALES
        )
        low = tl.zeros((LINES, 16), tl.float32) + low
        value = number * scale[:, :, None] - low[:, :, None]
    column = at[:, None, None] * CODES + place
    index = tl.program_id(0) * 16 + row
    live = (line < lines)[:, None, None] & (index < rows)[None, :, None] & (column < cols)
    tl.store(out + index[None, :, None].to(tl.int64) * cols + column, value, mask=live)


def _launch(
    kind: int, rows: int, cols: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """The grid of one matrix, its size and its constants."""
    walk = Walk.of(kind, cols)
    block_words, low, high, zero, table, scales, parts, float_kind = walk.constants
    constants = {
        "BLOCK_WORDS": block_words, "LOW": low, "HIGH": high, "ZERO": zero, "TABLE": table,
        "SCALES": scales, "PARTS": parts, "FLOAT": float_kind,
        "CODES": 32 // low,  # columns of a word, for floats too
        "LINES": LINES,
    }  # fmt: skip
    grid = -(-rows // 16), -(-walk.lines // LINES)
    sizes = rows, cols, walk.group_bytes, walk.payload_bytes, walk.lines
    return grid, sizes, constants


def dequantise(packed: Tensor, kind: int, out: Tensor) -> Tensor:
    """Fills `out` with the numbers of a packed matrix and returns it.

    Args:
        packed: (bytes,) uint8, a matrix of out's shape and type `kind` (ggml number).
        out: (rows, cols) float32, bfloat16 or float16, contiguous.
    """
    rows, cols = out.shape
    grid, arguments, constants = _launch(kind, rows, cols)
    _dequantise[grid](
        packed, out, iq4_table(out.device), packed, 0, 0, 0, 0, *arguments, SLABS=False,
        **constants,
    )  # fmt: skip
    return out


def dequantise_group(slabs: Tensor, start: int, kind: int, out: Tensor, routes: Routes,
                     group: Group) -> Tensor:  # fmt: skip
    """Fills `out` with one matrix of each of a group's experts and returns it.

    Args:
        slabs: (slabs, bytes) uint8; `Routes.table` says whose is where.
        start: where the matrix is in a slab.
        kind: its type (ggml number).
        out: (experts of the group, rows, cols), each matrix contiguous; types as `dequantise`.
        routes, group: which experts.
    """
    rows, cols = out.shape[1:]
    grid, arguments, constants = _launch(kind, rows, cols)
    _dequantise[(*grid, len(group.counts))](
        slabs.view(-1)[start:], out, iq4_table(out.device), routes.table, routes.table.shape[1],
        group.first, slabs.shape[1], out.stride(0), *arguments, SLABS=True, **constants,
    )  # fmt: skip
    return out
