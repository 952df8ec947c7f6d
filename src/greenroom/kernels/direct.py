"""Products of many tokens with the packed matrices of a group of experts, straight from their
blocks: a tile of weights becomes float16 where it is multiplied, so that nothing is expanded in
memory. For experts with few rows each, where expanding would cost more than the product.

Weights lie as docs/slab-layout.md says; how rows are told to kernels, `kernels.grouped`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.grouped import Group, Routes, members, pick, room_for, wide
from greenroom.kernels.launch import kernel
from greenroom.kernels.lines import Walk
from greenroom.kernels.matvec import iq4_table
from greenroom.kernels.packed import factors


@triton.jit
def _weights(
    group, iq4, start, blocks, payload_bytes, C: tl.constexpr, SUBS: tl.constexpr
):  # fmt: skip
    # group: pointers to (G,) groups of 16 rows; start: first block. float16 (G * 16, columns).
    LOW: tl.constexpr = C[1]
    PARTS: tl.constexpr = C[6]
    LINES: tl.constexpr = LOW // PARTS  # of a part
    CODES: tl.constexpr = 32 // LOW
    G: tl.constexpr = group.shape[0]
    row = tl.arange(0, 16)
    sub = tl.arange(0, SUBS)
    block = start + sub // PARTS
    block = tl.where(block < blocks, block, 0)
    inner = (sub % PARTS * LINES)[:, None] + tl.arange(0, LINES)[None, :]  # (SUBS, LINES)
    first = (block * C[0])[:, None]
    words = group.to(tl.pointer_type(tl.int32))[:, None, None, None]
    at = words + (first + inner * 16)[None, :, :, None] + row[None, None, None, :]
    word = tl.load(at)
    records = (group + payload_bytes)[:, None, None]
    part = (sub % PARTS)[None, :, None]
    scale, low = factors(records, block[None, :, None], row[None, None, :], part, C[5])
    value = _numbers(word, words, first, inner, row, iq4, C)
    value *= scale[:, :, None, :, None]
    if C[5] == 1 or C[5] == 4 or C[5] == 5:  # they have a minimum
        value -= low[:, :, None, :, None]
    value = tl.permute(value.to(tl.float16), (0, 3, 1, 2, 4))
    return tl.reshape(value, (G * 16, SUBS * LINES * CODES))


@triton.jit
def _numbers(word, words, first, inner, row, iq4, C: tl.constexpr):
    """The codes of words (G, parts, lines, 16) as float32 before the scale, (..., codes)."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    CODES: tl.constexpr = 32 // LOW
    word = word[:, :, :, :, None]
    place = tl.arange(0, CODES)[None, None, None, None, :]
    code = (word >> (8 * (place % 4) + LOW * (place // 4))) & ((1 << LOW) - 1)
    if HIGH > 0:
        PER: tl.constexpr = 8 // HIGH
        quad = inner * (8 // LOW)
        line = first + (LOW + quad // PER) * 16
        high = tl.load(words + line[None, :, :, None] + row[None, None, None, :])
        high = (high >> (quad % PER * HIGH)[None, :, :, None])[:, :, :, :, None]
        high = (high >> (8 * (place % 4) + HIGH * (place // 4))) & ((1 << HIGH) - 1)
        code |= high << LOW
    if C[4] == 1:  # E2M1: its bits moved to where a half has them, times 2^14 for the bias
        bits = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.uint16)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif C[4] == 2:
        number = tl.load(iq4 + code)
    else:
        number = (code - C[3]).to(tl.float32)
    return number


@kernel(do_not_specialize=["first", "count", "skip", "rows"])
def _direct(
    a, memory, slab_bytes, out, out_stride, iq4, tokens, starts, table, experts, first, count,
    skip, rows, n, cols, group_bytes, payload_bytes, C: tl.constexpr, GATHER: tl.constexpr,
    PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    expert, low, number, shift = members(starts, table, experts, first, count, skip, rows, PAD)
    # Tiles of one expert follow each other, rows fastest: its weights are read while in cache.
    ends = tl.cumsum((number + BM - 1) // BM * tl.cdiv(n, BN), 0)
    if tl.program_id(0) >= tl.max(ends, 0):  # the grid is for the worst case
        return
    which = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
    chosen = tl.arange(0, PAD) == which
    low, number = pick(low, chosen), pick(number, chosen)
    high = tl.cdiv(number, BM)
    tile = tl.program_id(0) - pick(ends, chosen) + high * tl.cdiv(n, BN)
    row = low + tile % high * BM + tl.arange(0, BM)
    live = row < low + number
    source = tl.where(live, row, low)
    if GATHER:
        source = tl.load(tokens + source + pick(shift, chosen))
    place = tl.load(table + 2 * experts + pick(expert, chosen)).to(tl.int64)
    group = tile // high * (BN // 16) + tl.arange(0, BN // 16)
    group = tl.where(group * 16 < n, group, 0)
    matrix = memory + place * slab_bytes + group.to(tl.int64) * group_bytes
    k = tl.arange(0, BLOCKS * 32)
    a_at = a + source.to(tl.int64)[:, None] * cols + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, cols // 32, BLOCKS):
        x = tl.load(a_at, mask=(k < cols - start * 32)[None, :], other=0.0)
        w = _weights(matrix, iq4, start, cols // 32, payload_bytes, C, BLOCKS * C[6])
        acc = tl.dot(x, tl.trans(w), acc)
        a_at += BLOCKS * 32
    column = tile // high * BN + tl.arange(0, BN)
    at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at, acc, mask=live[:, None] & (column < n)[None, :])


def tile(rows: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """Rows and columns of a tile, blocks of 32 columns, warps and stages, for `rows` of an
    expert."""
    if rows <= 24:
        return (16, 128, 2, 4, 3) if rows <= 12 else (32, 128, 2, 4, 3)
    return (128, 256, 2, 8, 3) if rows > 48 and wide(device) else (64, 128, 4, 4, 2)


def direct(
    a: Tensor, slabs: Tensor, start: int, kind: int, out: Tensor, routes: Routes, group: Group,
    skip: int, gather: bool,
) -> None:  # fmt: skip
    """Multiplies every expert's rows by the transpose of one of its matrices.

    Args:
        a: float16, (tokens, cols) if rows are gathered, else (rows, cols) of the pass.
        slabs: (slabs, bytes) uint8, where `Routes.table` says.
        start: where the matrix is in a slab.
        kind: its quantised type (ggml number).
        out: (rows, n) float32 of the pass, columns contiguous; filled.
        routes, group: whose rows; of the group's counts only how many there are is read.
        skip: rows of the group before this pass.
        gather: whether `a` has tokens.
    """
    rows, n = out.shape
    cols, experts = a.shape[1], len(group.counts)
    walk = Walk.of(kind, cols)
    bm, bn, blocks, warps, stages = tile(-(-rows // experts), a.device)
    most = rows // bm + min(experts, rows)  # tiles of rows, however they are spread
    _direct[(most * -(-n // bn),)](
        a, slabs.view(-1)[start:], slabs.shape[1], out, out.stride(0), iq4_table(a.device),
        routes.tokens, routes.starts, routes.table, routes.table.shape[1], group.first, experts,
        skip, rows, n, cols, walk.group_bytes, walk.payload_bytes, C=walk.constants,
        GATHER=gather, PAD=room_for(experts, routes.table.shape[1]), BM=bm, BN=bn,
        BLOCKS=blocks, num_warps=warps, num_stages=stages,
    )  # fmt: skip
