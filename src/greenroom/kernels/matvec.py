"""Quantised matrix times a few vectors on the GPU: weights are read once, in their blocks.

A program owns 16 rows and walks the columns; no tensor cores, since a step of one to four tokens
is bound by the bytes of the weights. Weights lie as docs/slab-layout.md says.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.lines import Walk, rows_product
from greenroom.kernels.packed import FORMATS, IQ4_VALUES, code, factors, number
from greenroom.kernels.planes import INTERPRETED, PLANES, group_dots, order, split

BLOCKS = 32  # blocks of 32 columns read at a time
SINGLE = 2  # tokens up to which each walks the lines by itself: wider loads, fewer instructions
MANY = 1024  # groups of rows from which there are programs enough to fill a GPU several times
FEW_LINES, FEW_WARPS = 256, 8  # of that walk below MANY: much to wait for at a time
LINES, WARPS = 64, 2  # and above
GROUPS, GROUPS_WARPS = 128, 8  # in planes: groups of sixteen columns, of any matrix


@triton.jit
def _matvec(
    packed,
    x,
    bias,
    out,
    iq4,
    rows,
    blocks,
    group_bytes,
    payload_bytes,
    tokens,
    BLOCK_WORDS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    group = packed + tl.program_id(0).to(tl.int64) * group_bytes
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, 16)
    lane = token[:, None] * blocks * 32
    acc = tl.zeros((TOKENS, 16), tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < blocks
        at = tl.where(inside, block, 0)
        words = group.to(tl.pointer_type(tl.int32)) + at[:, None] * BLOCK_WORDS + row[None, :]
        live = (token < tokens)[:, None] & inside[None, :]
        for part in tl.static_range(PARTS):
            scale, low = factors(group + payload_bytes, at[:, None], row[None, :], part, SCALES)
            dot = tl.zeros((TOKENS, BLOCKS, 16), tl.float32)
            total = tl.zeros((TOKENS, BLOCKS), tl.float32)
            for quad in tl.static_range(part * (8 // PARTS), (part + 1) * (8 // PARTS)):
                for byte in tl.static_range(4):
                    value = number(code(words, quad, byte, LOW, HIGH), iq4, ZERO, TABLE)
                    column = lane + at[None, :] * 32 + 4 * quad + byte
                    activation = tl.load(x + column, mask=live, other=0.0)
                    dot += value[None, :, :] * activation[:, :, None]
                    total += activation
            acc += tl.sum(dot * scale[None, :, :] - total[:, :, None] * low, 1)
    index = tl.program_id(0) * 16 + row
    if BIAS:
        acc += tl.load(bias + index, mask=index < rows, other=0.0)[None, :]
    tl.store(
        out + token[:, None] * rows + index[None, :],
        acc,
        mask=(token < tokens)[:, None] & (index < rows)[None, :],
    )


@triton.jit
def _walk(
    packed, x, bias, out, iq4, rows, cols, group_bytes, payload_bytes, lines, C: tl.constexpr,
    BIAS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    y = rows_product(
        packed, iq4, x + token * cols, cols, group_bytes, payload_bytes, lines, C, LINES
    )
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    if BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(out + token * rows + row, y, mask=row < rows)


@triton.jit
def _dots(
    packed, words, units, bias, out, rows, cols, group_bytes, payload_bytes, C: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    matrix = packed + tl.program_id(1).to(tl.int64) * group_bytes
    words += token * PLANES * (cols // 4)
    units += token * (cols // 8)
    acc = tl.zeros((GROUPS, 16), tl.float32)
    for start in range(0, cols // 16, GROUPS):
        part, _ = group_dots(
            matrix, matrix, words, units, start + tl.arange(0, GROUPS), cols // 16, cols // 4,
            payload_bytes, C, PLANES, ASM, False,
        )  # fmt: skip
        acc += part
    y = tl.sum(acc, 0)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    if BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(out + token * rows + row, y, mask=row < rows)


@cache
def iq4_table(device: torch.device) -> Tensor:
    """IQ4's sixteen values as float32 on the device."""
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)


def matvec(
    packed: Tensor,
    kind: int,
    rows: int,
    cols: int,
    x: Tensor,
    bias: Tensor | None = None,
    cut: Callable[[Tensor, int], tuple[Tensor, Tensor]] = split,
) -> Tensor:
    """x times the transpose of a packed matrix.

    Args:
        packed: (bytes,) uint8, a (rows, cols) matrix of quantised type `kind` (ggml number).
        x: (tokens, cols) float32, contiguous.
        bias: (rows,) float32.
        cut: `split`, or what knows the planes of x already.

    Returns:
        (tokens, rows) float32.
    """
    form = FORMATS[kind]
    tokens = x.shape[0]
    out = torch.empty(tokens, rows, device=x.device, dtype=torch.float32)
    if tokens <= SINGLE:
        walk, groups = Walk.of(kind, cols), -(-rows // 16)
        in_planes = order(walk.constants)
        if in_planes:
            _dots[(tokens, groups)](
                packed, *cut(x, in_planes), x if bias is None else bias, out, rows, cols,
                walk.group_bytes, walk.payload_bytes, C=walk.constants, PLANES=PLANES,
                ASM=not INTERPRETED, BIAS=bias is not None, GROUPS=GROUPS, num_warps=GROUPS_WARPS,
            )  # fmt: skip
            return out
        lines, warps = (LINES, WARPS) if groups > MANY else (FEW_LINES, FEW_WARPS)
        _walk[(tokens, groups)](
            packed, x, x if bias is None else bias, out, iq4_table(x.device), rows, cols,
            walk.group_bytes, walk.payload_bytes, walk.lines, C=walk.constants,
            BIAS=bias is not None, LINES=lines, num_warps=warps,
        )  # fmt: skip
        return out
    per_program = min(4, triton.next_power_of_2(tokens))
    _matvec[(-(-rows // 16), -(-tokens // per_program))](
        packed, x, x if bias is None else bias, out, iq4_table(x.device), rows, cols // 32,
        form.group_bytes(cols), form.payload_bytes(cols), tokens, BLOCK_WORDS=form.block_words,
        LOW=form.low_bits, HIGH=form.high_bits, ZERO=form.zero, TABLE=form.table,
        SCALES=form.scales, PARTS=form.parts, BIAS=bias is not None, TOKENS=per_program,
        BLOCKS=BLOCKS,
    )  # fmt: skip
    return out


def matvec_twin(weights: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`matvec` on dequantised weights (rows, cols) float32; the truth it is held against."""
    return torch.nn.functional.linear(x, weights, bias)
