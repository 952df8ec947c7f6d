"""Numbers out of whole lines of packed weights: the walk shared by kernels that read a matrix
once (docs/slab-layout.md). A tile is (lines, 16 rows) of 32-bit words, contiguous in memory, so
that loads are as wide as the machine has them. Knows formats; not what is computed with them.
"""

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from greenroom.kernels.packed import FORMATS, factors

# Kinds of float lines; 0 is a quantised format.
_FLOATS = {0: (3, 1), 1: (1, 2), 30: (2, 2)}  # ggml type: kind, columns of a word


@dataclass(frozen=True, slots=True)
class Walk:
    """How a kernel walks a matrix of one type.

    Attributes:
        constants: compile-time arguments of the kernels, in the order they take them:
            words of a block, low bits, high bits, zero, table, kind of scales, parts, float kind.
        group_bytes, payload_bytes: of 16 rows.
        lines: of low words of 16 rows.
    """

    constants: tuple[int, int, int, int, int, int, int, int]
    group_bytes: int
    payload_bytes: int
    lines: int

    @staticmethod
    @cache
    def of(kind: int, cols: int) -> "Walk":
        """The walk over rows of `cols` columns of ggml type `kind`."""
        blocks = -(-cols // 32)
        if kind in _FLOATS:
            code, width = _FLOATS[kind]
            size = 32 // width
            payload = blocks * size * 64
            return Walk((size * 16, size, 0, 0, 0, 0, 1, code), payload, payload, blocks * size)
        form = FORMATS[kind]
        constants = (
            form.block_words, form.low_bits, form.high_bits, form.zero, form.table, form.scales,
            form.parts, 0,
        )  # fmt: skip
        group, payload = form.group_bytes(cols), form.payload_bytes(cols)
        return Walk(constants, group, payload, blocks * form.low_bits)


@triton.jit
def line_products(
    group,
    iq4,
    x,
    line,
    lines,
    cols,
    payload_bytes,
    BLOCK_WORDS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    FLOAT: tl.constexpr,
):  # x: pointer to float32 columns; line: (L,) indices; the sums of each line's columns, (L, 16)
    row = tl.arange(0, 16)
    live = line < lines
    at = tl.where(live, line, 0)
    block = at // LOW
    inner = at % LOW
    words = group.to(tl.pointer_type(tl.int32)) + block * BLOCK_WORDS
    word = tl.load(words[:, None] + inner[:, None] * 16 + row[None, :])
    if FLOAT == 3:
        activation = tl.load(x + at, mask=live & (at < cols), other=0.0)
        out = word.to(tl.float32, bitcast=True) * activation[:, None]
    elif FLOAT > 0:
        out = tl.zeros((line.shape[0], 16), tl.float32)
        for half in tl.static_range(2):
            column = at * 2 + half
            activation = tl.load(x + column, mask=live & (column < cols), other=0.0)
            if FLOAT == 2:
                bits = (word << 16) if half == 0 else (word & -65536)
                value = bits.to(tl.float32, bitcast=True)
            else:
                bits = ((word >> (16 * half)) & 0xFFFF).to(tl.uint16)
                value = bits.to(tl.float16, bitcast=True).to(tl.float32)
            out += value * activation[:, None]
    else:
        QUADS: tl.constexpr = 8 // LOW
        BITS: tl.constexpr = LOW + HIGH
        MASK: tl.constexpr = (1 << LOW) - 1
        first = inner * QUADS  # of the line's quads of columns within its block
        if HIGH > 0:
            PER: tl.constexpr = 8 // HIGH
            H_MASK: tl.constexpr = (1 << HIGH) - 1
            place = (words + (LOW + first // PER) * 16)[:, None] + row[None, :]
            high = tl.load(place) >> ((first % PER) * HIGH)[:, None]
        out = tl.zeros((line.shape[0], 16), tl.float32)
        total = tl.zeros((line.shape[0],), tl.float32)
        for quad in tl.static_range(QUADS):
            for byte in tl.static_range(4):
                column = block * 32 + (first + quad) * 4 + byte
                activation = tl.load(x + column, mask=live, other=0.0)
                code = (word >> (8 * byte + LOW * quad)) & MASK
                if HIGH > 0:
                    code |= ((high >> (8 * byte + HIGH * quad)) & H_MASK) << LOW
                if TABLE == 1:  # E2M1: its bits moved to where a half has them
                    bits = ((code & 7) << 9) | ((code & 8) << 12)
                    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                elif TABLE == 2:
                    value = tl.load(iq4 + code)
                else:  # 1 + code / 2^BITS without a conversion; the 1 is taken off below
                    value = ((code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
                out += value * activation[:, None]
                total += activation
        part = first // 4 if PARTS == 2 else first * 0
        scale, low = factors(
            group + payload_bytes, block[:, None], row[None, :], part[:, None], SCALES
        )
        if TABLE == 1:
            out *= scale * 16384.0  # the exponent's bias
        elif TABLE == 2:
            out *= scale
        else:
            one = (1 << BITS) + ZERO
            out = (out * (1 << BITS) - total[:, None] * one) * scale - total[:, None] * low
    return tl.where(live[:, None], out, 0.0)


@triton.jit
def rows_product(
    matrix, iq4, x, cols, group_bytes, payload_bytes, lines, C: tl.constexpr, LINES: tl.constexpr
):  # the products of the program's 16 rows, (16,) float32; C: `Walk.constants`
    group = matrix + tl.program_id(1).to(tl.int64) * group_bytes
    acc = tl.zeros((LINES, 16), tl.float32)
    for start in range(0, lines, LINES):
        line = start + tl.arange(0, LINES)
        acc += line_products(
            group, iq4, x, line, lines, cols, payload_bytes,
            C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7],
        )  # fmt: skip
    return tl.sum(acc, 0)
