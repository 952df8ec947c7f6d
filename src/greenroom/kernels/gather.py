"""Rows of an embedding table in RAM, read over the bus and decoded by the GPU, so that a step can
begin with a token the host has not seen. Blocks lie as in the file. Numbers are those of the
host's decoder bit by bit: the same multiplications in the same order, none fused.
"""

import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel

BLOCK = 512  # columns of a program
F32: tl.constexpr = tl.constexpr(0)
F16: tl.constexpr = tl.constexpr(1)
Q4_0: tl.constexpr = tl.constexpr(2)
Q8_0: tl.constexpr = tl.constexpr(8)
Q4_K: tl.constexpr = tl.constexpr(12)
Q5_K: tl.constexpr = tl.constexpr(13)
Q6_K: tl.constexpr = tl.constexpr(14)
BF16: tl.constexpr = tl.constexpr(30)
KINDS = frozenset(kind.value for kind in (F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K))  # of ggml


@triton.jit
def _half(at, live):
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask=live, other=0.0).to(tl.float32)


@triton.jit
def _byte(at, live):
    return tl.load(at, mask=live, other=0).to(tl.int32)


@triton.jit
def _legacy(line, column, live, KIND: tl.constexpr):
    """Blocks of 32 columns with one scale."""
    inner = column % 32
    if KIND == Q8_0:
        block = line + column // 32 * 34
        code = _byte(block + 2 + inner, live)
        code = (code ^ 128) - 128
    else:
        block = line + column // 32 * 18
        code = ((_byte(block + 2 + inner % 16, live) >> (inner // 16 * 4)) & 15) - 8
    return _half(block, live) * code.to(tl.float32)


@triton.jit
def _affine(line, column, live, KIND: tl.constexpr):
    """Q4_K and Q5_K: eight runs of 32 columns, each with a scale and a minimum of 6 bits."""
    BYTES: tl.constexpr = 144 if KIND == Q4_K else 176
    block = line + column // 256 * BYTES
    inner = column % 256
    run = inner // 32
    own = block + 4 + run % 4
    first = _byte(own, live)
    second = _byte(own + 4, live)
    third = _byte(own + 8, live)
    scale = tl.where(run < 4, first & 63, (third & 15) | (first >> 6 << 4))
    least = tl.where(run < 4, second & 63, (third >> 4) | (second >> 6 << 4))
    codes = block + (BYTES - 128)
    code = (_byte(codes + run // 2 * 32 + inner % 32, live) >> (run % 2 * 4)) & 15
    if KIND == Q5_K:
        code |= ((_byte(block + 16 + inner % 32, live) >> run) & 1) << 4
    scales = _half(block, live) * scale.to(tl.float32)
    return scales * code.to(tl.float32) - _half(block + 2, live) * least.to(tl.float32)


@triton.jit
def _sixth(line, column, live):
    """Q6_K: sixteen runs of 16 columns, each with a scale of 8 bits."""
    block = line + column // 256 * 210
    inner = column % 256
    half, place = inner // 128, inner % 128
    low = (_byte(block + half * 64 + place % 64, live) >> (place // 64 * 4)) & 15
    high = (_byte(block + 128 + half * 32 + place % 32, live) >> (place // 32 * 2)) & 3
    scale = _byte(block + 192 + inner // 16, live)
    scale = (scale ^ 128) - 128
    code = (low | high << 4) - 32
    return _half(block + 208, live) * scale.to(tl.float32) * code.to(tl.float32)


@kernel
def _gather(table, ids, chosen, out, rows, width, row_bytes, KIND: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    token = tl.load(ids + row)
    token = tl.where(token < 0, tl.load(chosen + row), token)
    token = tl.minimum(tl.maximum(token, 0), rows - 1)
    line = table + token.to(tl.int64) * row_bytes
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    if KIND == F32:
        value = tl.load(line.to(tl.pointer_type(tl.float32)) + column, mask=live)
    elif KIND == F16:
        value = tl.load(line.to(tl.pointer_type(tl.float16)) + column, mask=live).to(tl.float32)
    elif KIND == BF16:
        bits = tl.load(line.to(tl.pointer_type(tl.uint16)) + column, mask=live, other=0)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == Q6_K:
        value = _sixth(line, column, live)
    elif KIND >= Q4_K:  # or Q5_K
        value = _affine(line, column, live, KIND)
    else:
        value = _legacy(line, column, live, KIND)
    tl.store(out + row.to(tl.int64) * width + column, value, mask=live)


def gather(table: Tensor, kind: int, ids: Tensor, chosen: Tensor, out: Tensor) -> Tensor:
    """Fills `out` with rows of the table and returns it.

    Args:
        table: (vocabulary, row bytes) uint8, in memory the device can read.
        kind: its type (ggml number), one of `KINDS`.
        ids: (n,) int64 on the device; negative: the row of the entry of `chosen` is taken.
        chosen: (n,) int64 on the device. What is in no table gives some row.
        out: (n, width) float32 on the device.
    """
    grid = len(ids), -(-out.shape[1] // BLOCK)
    _gather[grid](
        table, ids, chosen, out, table.shape[0], out.shape[1], table.shape[1], KIND=kind,
        BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out
