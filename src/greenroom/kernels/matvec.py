"""Quantised matrix times a few vectors on the GPU: weights are read once, in their blocks.

A program owns 16 rows and walks the columns for one token or four; no tensor cores, since a step
of few tokens is bound by the bytes of the weights. Weights lie as docs/slab-layout.md says.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import INTERPRETED, kernel
from greenroom.kernels.lines import Walk, rows_product
from greenroom.kernels.packed import IQ4_VALUES
from greenroom.kernels.planes import (
    PLANES,
    group_dots,
    group_dots_of_four,
    order,
    split,
)

SINGLE = 2  # tokens up to which each reads the matrix by itself; beyond, four take codes apart once
MANY = 1024  # groups of rows from which there are programs enough to fill a GPU several times
FEW_LINES, FEW_WARPS = 256, 8  # of that walk below MANY: much to wait for at a time
LINES, WARPS = 64, 2  # and above
FOUR, FOUR_WARPS = 64, 4  # the same for four tokens
MORE, MORE_WARPS = 32, 4  # and for more
GROUPS, GROUPS_WARPS = 128, 8  # in planes: groups of sixteen columns, of any matrix


@kernel
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


@kernel
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


@triton.jit
def _store(acc, bias, out, token, tokens, rows, BIAS: tl.constexpr):
    y = tl.sum(acc, 0)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    if BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(out + token * rows + row, y, mask=row < tl.where(token < tokens, rows, 0))


@kernel
def _four(
    packed, words, units, bias, out, tokens, rows, cols, group_bytes, payload_bytes,
    C: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * 4
    matrix = packed + tl.program_id(1).to(tl.int64) * group_bytes
    acc0 = tl.zeros((GROUPS, 16), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for start in range(0, cols // 16, GROUPS):
        y0, y1, y2, y3 = group_dots_of_four(
            matrix, words, units, token, tokens, start + tl.arange(0, GROUPS), cols // 16,
            cols // 4, payload_bytes, C, PLANES, ASM,
        )  # fmt: skip
        acc0 += y0
        acc1 += y1
        acc2 += y2
        acc3 += y3
    _store(acc0, bias, out, token, tokens, rows, BIAS)
    _store(acc1, bias, out, token + 1, tokens, rows, BIAS)
    _store(acc2, bias, out, token + 2, tokens, rows, BIAS)
    _store(acc3, bias, out, token + 3, tokens, rows, BIAS)


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
    out = torch.empty(len(x), rows, device=x.device, dtype=torch.float32)
    walk, groups = Walk.of(kind, cols), -(-rows // 16)
    last = (x if bias is None else bias, out)
    if in_planes := order(walk.constants):
        _in_planes(packed, walk, groups, cut(x, in_planes), *last, bias is not None)
        return out
    lines, warps = (LINES, WARPS) if groups > MANY else (FEW_LINES, FEW_WARPS)
    _walk[(len(x), groups)](
        packed, x, *last, iq4_table(x.device), rows, cols, walk.group_bytes, walk.payload_bytes,
        walk.lines, C=walk.constants, BIAS=bias is not None, LINES=lines, num_warps=warps,
    )  # fmt: skip
    return out


def _in_planes(
    packed: Tensor, walk: Walk, groups: int, planes: tuple[Tensor, Tensor], bias: Tensor,
    out: Tensor, biased: bool,
) -> None:  # fmt: skip
    tokens, rows = out.shape
    cols = 4 * planes[0].shape[2]
    constants = {"C": walk.constants, "PLANES": PLANES, "ASM": not INTERPRETED, "BIAS": biased}
    sizes = rows, cols, walk.group_bytes, walk.payload_bytes
    if tokens <= (1 if groups > MANY else SINGLE):
        _dots[(tokens, groups)](
            packed, *planes, bias, out, *sizes, GROUPS=GROUPS, num_warps=GROUPS_WARPS,
            **constants,
        )  # fmt: skip
    else:
        read, warps = (FOUR, FOUR_WARPS) if tokens <= 4 else (MORE, MORE_WARPS)
        _four[(-(-tokens // 4), groups)](
            packed, *planes, bias, out, tokens, *sizes, GROUPS=read, num_warps=warps,
            **constants,
        )  # fmt: skip


def matvec_twin(weights: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`matvec` on dequantised weights (rows, cols) float32; the truth it is held against."""
    return torch.nn.functional.linear(x, weights, bias)
