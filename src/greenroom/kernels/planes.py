"""Activations as planes of bytes, and their products with packed codes by the four-byte dot
instruction: exact integers within a line of weights, so that only scales are ever rounded.

Sixteen columns share a unit; three planes keep 23 bits of the largest of them, as many as a
float32 has. Beside the unit stands the columns' sum, for codes that count from a zero of their
own. A word is four columns of one plane. Where codes are looked up in a table of sixteen,
words take the order in which the byte permutation yields them: of eight columns k..k+7 first
k, k+4, k+1, k+5, then k+2, k+6, k+3, k+7. Knows formats; not what is computed with them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.packed import E2M1, IQ4, factors

PLANES = 3
PER_UNIT = 16  # columns
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
def _dp4a(codes, x, acc, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """acc plus the sum over four codes, signed bytes or not, times four signed bytes."""
    if ASM:
        if SIGNED:
            acc = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            acc = tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
    else:
        for byte in tl.static_range(4):
            code = (codes << (24 - 8 * byte)) >> 24
            if not SIGNED:
                code &= 255
            acc += code * ((x << (24 - 8 * byte)) >> 24)
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
def store_planes(value, words, units, first, stride, inside, PLANES: tl.constexpr):
    """Stores (W, 4) float32, columns as `columns_of`, from word `first` on.

    words: pointer to int32 planes, `stride` words each; units: pointer to float32 pairs.
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
    tl.store(units + group * 2, unit, mask=group < inside // 4)
    tl.store(units + group * 2 + 1, tl.sum(groups, 1), mask=group < inside // 4)


@triton.jit
def _split(x, words, units, cols, ORDER: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK // 4
    column = columns_of(first + tl.arange(0, BLOCK // 4), ORDER)
    value = tl.load(x + token * cols + column, mask=column < cols, other=0.0)
    stride = cols // 4
    store_planes(
        value, words + token * PLANES * stride, units + token * (cols // 8), first, stride,
        stride, PLANES,
    )  # fmt: skip


def room(tokens: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for what `split` returns."""
    words = torch.empty(tokens, PLANES, cols // 4, dtype=torch.int32, device=device)
    return words, torch.empty(tokens, cols // PER_UNIT, 2, device=device)


def split(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Cuts activations into planes.

    Args:
        x: (tokens, cols) float32, contiguous; cols a multiple of 32.
        kind: NATURAL or PERMUTED order of columns.

    Returns:
        (tokens, PLANES, cols / 4) int32, most significant plane first, and
        (tokens, cols / 16, 2) float32: the unit of the last plane, and the columns' sum.
    """
    tokens, cols = x.shape
    words, units = room(tokens, cols, x.device)
    _split[(tokens, -(-cols // COLUMNS))](
        x, words, units, cols, ORDER=kind, PLANES=PLANES, BLOCK=COLUMNS
    )
    return words, units


def split_twin(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """`split` in plain torch; the truth it is held against."""
    tokens, cols = x.shape
    groups = x.view(tokens, -1, PER_UNIT)
    unit = groups.abs().amax(-1) / (127 * (1 << (8 * PLANES - 8)))
    whole = torch.where(unit > 0, 1 / unit, 0.0)[..., None] * groups
    rest = torch.floor(whole + 0.5).int().view(tokens, cols)
    if kind == PERMUTED:
        places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        rest = rest.view(tokens, -1, 8)[..., places.to(x.device)].reshape(tokens, cols)
    planes: list[Tensor] = []
    for _ in range(PLANES - 1):
        low = ((rest + 128) & 255) - 128
        planes.insert(0, low)
        rest = (rest - low) >> 8
    planes.insert(0, rest)
    bytes_ = torch.stack(planes, 1).to(torch.int8)
    return bytes_.view(torch.int32), torch.stack([unit, groups.sum(-1)], -1)


@triton.jit
def _codes(group, line, C: tl.constexpr):
    """Words of lines (L,): the low plane's and, if there is a second, that one's, (L, 16)."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    here = group.to(tl.pointer_type(tl.int32)) + tl.arange(0, 16)[None, :]
    if HIGH == 0:
        word = tl.load(here + (line * 16)[:, None])
        high = word
    else:
        PER: tl.constexpr = 8 // HIGH
        block = line // LOW * C[0]
        first = line % LOW * (8 // LOW)
        word = tl.load(here + (block + line % LOW * 16)[:, None])
        high = tl.load(here + (block + (LOW + first // PER) * 16)[:, None])
        high = high >> ((first % PER) * HIGH)[:, None]
    return word, high


@triton.jit
def _quad(word, high, quad: tl.constexpr, C: tl.constexpr, ASM: tl.constexpr):
    """The codes of a line's `quad`-th four columns, as bytes."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    MASK: tl.constexpr = ((1 << LOW) - 1) * 0x01010101
    if C[4] == 1:
        codes = _e2m1(word >> (16 * quad), ASM)
    elif LOW == 8:
        codes = word ^ -2139062144  # 0x80808080: from 0..255 around 128 to signed
    else:
        codes = (word >> (LOW * quad)) & MASK
        if HIGH > 0:
            H_MASK: tl.constexpr = ((1 << HIGH) - 1) * 0x01010101
            codes |= ((high >> (HIGH * quad)) & H_MASK) << LOW
    return codes


@triton.jit
def _scaled(value, unit, total, records, line, C: tl.constexpr):
    """Sums of codes (L, 16) with scales, minima and zeros; unit, total: (L,)."""
    LOW: tl.constexpr = C[1]
    first = line % LOW * (8 // LOW)
    part = first // 4 if C[6] == 2 else first * 0
    row = tl.arange(0, 16)[None, :]
    scale, low = factors(records, (line // LOW)[:, None], row, part[:, None], C[5])
    if C[4] == 1:  # codes are twice the value plus 12
        scale *= 0.5
    ZERO: tl.constexpr = 12 if C[4] == 1 else (0 if LOW == 8 else C[3])
    out = value * (scale * unit[:, None])
    if ZERO > 0:
        low += ZERO * scale
    if ZERO > 0 or (C[5] == 1 or C[5] == 4 or C[5] == 5):  # the last three have a minimum
        out -= total[:, None] * low
    return out


@triton.jit
def line_dots(
    first, second, words, units, line, lines, stride, payload_bytes, C: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Products of each line's columns in two groups of rows of one format, (L, 16) float32 each;
    see `line_products`. words, units: one token's planes of `stride` words and its units. Without
    TWO the second is left out.
    """
    LOW: tl.constexpr = C[1]
    QUADS: tl.constexpr = 8 // LOW
    live = line < lines
    at = tl.where(live, line, 0)
    word, high = _codes(first, at, C)
    word2, high2 = word, high
    if TWO:
        word2, high2 = _codes(second, at, C)
    value = tl.zeros((line.shape[0], 16), tl.float32)
    value2 = value
    for plane in tl.static_range(PLANES):
        acc = tl.zeros((line.shape[0], 16), tl.int32)
        acc2 = acc
        for quad in tl.static_range(QUADS):
            if quad % 2 == 0:
                if QUADS == 1:
                    x = tl.load(words + plane * stride + at, mask=live, other=0)
                else:  # two words at once
                    pair = (words + plane * stride).to(tl.pointer_type(tl.int64))
                    both = tl.load(pair + at * (QUADS // 2) + quad // 2, mask=live, other=0)
                    x = both.to(tl.int32)
            else:
                x = (both >> 32).to(tl.int32)
            acc = _dp4a(_quad(word, high, quad, C, ASM), x[:, None], acc, LOW == 8, ASM)
            if TWO:
                acc2 = _dp4a(_quad(word2, high2, quad, C, ASM), x[:, None], acc2, LOW == 8, ASM)
        value = value * 256.0 + _float(acc)
        if TWO:
            value2 = value2 * 256.0 + _float(acc2)
    group = at * QUADS // 4  # of sixteen columns; their sum counts once
    unit = tl.load(units + group * 2, mask=live, other=0.0)
    total = tl.load(units + group * 2 + 1, mask=live & (at * QUADS % 4 == 0), other=0.0)
    value = _scaled(value, unit, total, first + payload_bytes, at, C)
    if TWO:
        value2 = _scaled(value2, unit, total, second + payload_bytes, at, C)
    return value, value2
