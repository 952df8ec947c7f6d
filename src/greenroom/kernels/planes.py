"""Activations as planes of bytes, and their products with packed codes by the four-byte dot
instruction: exact integers within a line of weights, so that only scales are ever rounded.

Sixteen columns share a scale; three planes keep 23 bits of the largest of them, as many as a
float32 has. A word is four columns of one plane. Where codes are looked up in a table of sixteen,
words take the order in which the byte permutation yields them: of eight columns k..k+7 first
k, k+4, k+1, k+5, then k+2, k+6, k+3, k+7. Knows formats; not what is computed with them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.packed import E2M1, IQ4, factors

PLANES = 3
PER_SCALE = 16  # columns
COLUMNS = 1024  # of a program
INTERPRETED = triton.knobs.runtime.interpret
NATURAL, PERMUTED = 1, 2  # orders of columns; 0: activations stay float32


def order(constants: tuple[int, ...]) -> int:
    """Which order of columns a matrix of `Walk.constants` is multiplied in; 0 for float lines and
    for tables that no two byte permutations hold."""
    table, floats = constants[4], constants[7]
    if floats or table == IQ4:
        return 0
    return PERMUTED if table == E2M1 else NATURAL


@triton.jit
def _dp4a(codes, x, acc, ASM: tl.constexpr):
    """acc plus the sum over four unsigned codes times four signed bytes."""
    if ASM:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for byte in tl.static_range(4):
            acc += ((codes >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24)
    return acc


@triton.jit
def _e2m1(word, ASM: tl.constexpr):
    """Twice the values of the word's low four E2M1 codes, plus 12, as bytes."""
    if ASM:  # a selector's top bit turns the byte into its sign, which is 0 in both tables
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; xor.b32 b, $1, 0x8888; prmt.b32 a, 0x0F0E0D0C, 0x18141210, $1; "
            "prmt.b32 b, 0x090A0B0C, 0x00040608, b; or.b32 $0, a, b; }",
            "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        out = word & 0
        for byte in tl.static_range(4):
            code = (word >> (4 * byte)) & 15
            e, m = (code & 7) >> 1, code & 1
            twice = tl.where(e > 0, (2 + m) << (tl.maximum(e, 1) - 1), m)
            out |= tl.where(code > 7, 12 - twice, 12 + twice) << (8 * byte)
    return out


@triton.jit
def _float(integer):
    """int32 below 2^22 as float32, without the slow conversion."""
    return (integer + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def columns_of(words, ORDER: tl.constexpr):
    """Columns of the four bytes of words (W,): (W, 4)."""
    byte = tl.arange(0, 4)[None, :]
    if ORDER == 2:
        column = (words // 2 * 8 + words % 2 * 2)[:, None] + byte // 2 + byte % 2 * 4
    else:
        column = words[:, None] * 4 + byte
    return column


@triton.jit
def in_order(value, ORDER: tl.constexpr):
    """16 columns side by side, (16,), as `columns_of` has them, (4, 4)."""
    if ORDER == 2:  # of eight columns: word 0 has 0 4 1 5, word 1 has 2 6 3 7
        value = tl.reshape(tl.trans(tl.reshape(value, (2, 2, 4)), (0, 2, 1)), (4, 4))
    else:
        value = tl.reshape(value, (4, 4))
    return value


@triton.jit
def store_planes(value, words, scales, first, stride, inside, PLANES: tl.constexpr):
    """Stores (W, 4) float32, columns as `columns_of`, from word `first` on.

    words: pointer to int32 planes, `stride` words each; scales: pointer to float32.
    """
    WORDS: tl.constexpr = value.shape[0]
    groups = tl.reshape(value, (WORDS // 4, 16))
    largest = tl.max(tl.abs(groups), 1)
    unit = largest / (127 * (1 << (8 * PLANES - 8)))
    inverse = tl.where(unit > 0, 1 / unit, 0.0)
    rest = tl.floor(groups * inverse[:, None] + 0.5).to(tl.int32)
    rest = tl.reshape(rest, (WORDS, 4))
    word = tl.arange(0, WORDS)
    at = words + first + word
    for i in tl.static_range(PLANES):
        low = rest
        if i < PLANES - 1:
            low = ((rest + 128) & 255) - 128
        packed = tl.xor_sum((low & 255) << (8 * tl.arange(0, 4))[None, :], 1)
        tl.store(at + (PLANES - 1 - i) * stride, packed, mask=first + word < inside)
        rest = (rest - low) >> 8
    group = first // 4 + tl.arange(0, WORDS // 4)
    tl.store(scales + group, unit, mask=group < inside // 4)


@triton.jit
def _split(x, words, scales, cols, ORDER: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK // 4
    column = columns_of(first + tl.arange(0, BLOCK // 4), ORDER)
    value = tl.load(x + token * cols + column, mask=column < cols, other=0.0)
    stride = cols // 4
    store_planes(
        value, words + token * PLANES * stride, scales + token * (cols // 16), first, stride,
        stride, PLANES,
    )  # fmt: skip


def room(tokens: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for what `split` returns."""
    words = torch.empty(tokens, PLANES, cols // 4, dtype=torch.int32, device=device)
    return words, torch.empty(tokens, cols // PER_SCALE, device=device)


def split(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Cuts activations into planes.

    Args:
        x: (tokens, cols) float32, contiguous; cols a multiple of 32.
        kind: NATURAL or PERMUTED order of columns.

    Returns:
        (tokens, PLANES, cols / 4) int32, most significant plane first, and
        (tokens, cols / 16) float32, the unit of the last plane.
    """
    tokens, cols = x.shape
    words, scales = room(tokens, cols, x.device)
    _split[(tokens, -(-cols // COLUMNS))](
        x, words, scales, cols, ORDER=kind, PLANES=PLANES, BLOCK=COLUMNS
    )
    return words, scales


def split_twin(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """`split` in plain torch; the truth it is held against."""
    tokens, cols = x.shape
    groups = x.view(tokens, -1, PER_SCALE)
    unit = groups.abs().amax(-1) / (127 * (1 << (8 * PLANES - 8)))
    whole = torch.where(unit > 0, 1 / unit, 0.0)[..., None] * groups
    rest = torch.floor(whole + 0.5).int().view(tokens, cols)
    if kind == PERMUTED:
        places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        rest = rest.view(tokens, -1, 8)[..., places.to(x.device)].reshape(tokens, cols)
    planes = []
    for _ in range(PLANES - 1):
        low = ((rest + 128) & 255) - 128
        planes.insert(0, low)
        rest = (rest - low) >> 8
    planes.insert(0, rest)
    bytes_ = torch.stack(planes, 1).to(torch.int8)
    return bytes_.view(torch.int32), unit


@triton.jit
def line_dots(
    group, words, scales, line, lines, stride, payload_bytes, C: tl.constexpr, PLANES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Products of each line's columns, (L, 16) float32; see `line_products`. words, scales:
    pointers to one token's planes of `stride` words and to its units."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    QUADS: tl.constexpr = 8 // LOW
    MASK: tl.constexpr = ((1 << LOW) - 1) * 0x01010101
    TABLE: tl.constexpr = C[4]
    ZERO: tl.constexpr = 12 if TABLE == 1 else C[3]
    row = tl.arange(0, 16)
    live = line < lines
    at = tl.where(live, line, 0)
    block = at // LOW
    first = at % LOW * QUADS  # of the line's quads of columns within its block
    here = group.to(tl.pointer_type(tl.int32)) + block * C[0]
    word = tl.load(here[:, None] + (at % LOW * 16)[:, None] + row[None, :])
    if HIGH > 0:
        PER: tl.constexpr = 8 // HIGH
        H_MASK: tl.constexpr = ((1 << HIGH) - 1) * 0x01010101
        high = tl.load((here + (LOW + first // PER) * 16)[:, None] + row[None, :])
        high = high >> ((first % PER) * HIGH)[:, None]
    out = tl.zeros((line.shape[0], 16), tl.float32)
    sums = tl.zeros((line.shape[0],), tl.float32)
    for plane in tl.static_range(PLANES):
        acc = tl.zeros((line.shape[0], 16), tl.int32)
        total = tl.zeros((line.shape[0],), tl.int32)
        for quad in tl.static_range(QUADS):
            x = tl.load(words + plane * stride + block * 8 + first + quad, mask=live, other=0)
            if TABLE == 1:
                codes = _e2m1(word >> (16 * quad), ASM)
            elif LOW == 8:
                codes = word
            else:
                codes = (word >> (LOW * quad)) & MASK
                if HIGH > 0:
                    codes |= ((high >> (HIGH * quad)) & H_MASK) << LOW
            acc = _dp4a(codes, x[:, None], acc, ASM)
            total = _dp4a(total * 0 + 0x01010101, x, total, ASM)
        if ZERO > 0:
            acc -= ZERO * total[:, None]
        out = out * 256.0 + _float(acc)
        sums = sums * 256.0 + _float(total)
    part = first // 4 if C[6] == 2 else first * 0
    scale, low = factors(group + payload_bytes, block[:, None], row[None, :], part[:, None], C[5])
    unit = tl.load(scales + block * 2 + first // 4, mask=live, other=0.0)
    out *= scale * (unit * (0.5 if TABLE == 1 else 1.0))[:, None]
    if C[5] == 1 or C[5] == 4 or C[5] == 5:  # formats with a minimum
        out -= (sums * unit)[:, None] * low
    return tl.where(live[:, None], out, 0.0)
