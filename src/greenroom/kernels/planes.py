"""Activations as planes of bytes, and their products with packed codes by the four-byte dot
instruction: integers within sixteen columns, so that little but scales is ever rounded.

Sixteen columns share a unit; three planes keep 23 bits of the largest of them, as many as a
float32 has. Beside the unit stands the columns' sum, for codes that count from a zero of their
own. A word is four columns of one plane. Where codes are looked up in a table of sixteen,
words take the order in which the byte permutation yields them: of eight columns k..k+7 first
k, k+4, k+1, k+5, then k+2, k+6, k+3, k+7. Knows formats; not what is computed with them.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel
from greenroom.kernels.packed import E2M1, IQ4, factors

PLANES = 3
PER_UNIT = 16  # columns
COLUMNS = 1024  # of a program
NATURAL, PERMUTED = 1, 2  # orders of columns; 0: activations stay float32


class Maker(Protocol):
    """Makes activations and can cut them into planes in the same launch.

    Attributes:
        kind: in which order; 0 for none.
    """

    kind: int


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
        up = 24 - 8 * tl.arange(0, 4)[None, None, :]  # one byte each to the top
        code = (codes[:, :, None] << up) >> 24
        if not SIGNED:
            code &= 255
        acc += tl.sum(code * ((x[:, :, None] << up) >> 24), 2)
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
        byte = tl.arange(0, 4)[None, None, :]
        code = (word[:, :, None] >> (4 * byte)) & 15
        e, m = (code & 7) >> 1, code & 1
        twice = tl.where(e > 0, (2 + m) << (tl.maximum(e, 1) - 1), m)
        out = tl.sum(tl.where(code > 7, 12 - twice, 12 + twice) << (8 * byte), 2)
    return out


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


@kernel
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


class Cutter:
    """Cuts activations, unless whoever made them has cut them already."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, tuple[Tensor, Tensor] | None, Maker] | None = None

    def made(
        self, x: Tensor, kind: int, planes: tuple[Tensor, Tensor] | None, maker: Maker
    ) -> None:
        """Tells that `maker` made x, and its planes unless kind is 0; nobody may change x now."""
        self._last = x, kind, planes, maker

    def __call__(self, x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        """See `split`; whoever made x without planes will be asked for them next time."""
        if self._last is not None and self._last[0] is x:
            _, known, planes, maker = self._last
            if planes is not None and known == kind:
                return planes
            maker.kind = maker.kind or kind
        return split(x, kind)


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
def _quad(word, high, quad: tl.constexpr, C: tl.constexpr, ASM: tl.constexpr):
    """The codes of a group's `quad`-th four columns, as bytes; word: the line they are in."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    MASK: tl.constexpr = ((1 << LOW) - 1) * 0x01010101
    SHIFT: tl.constexpr = quad % (8 // LOW)
    if C[4] == 1:
        codes = _e2m1(word >> (16 * SHIFT), ASM)
    elif LOW == 8:
        codes = word ^ -2139062144  # 0x80808080: from 0..255 around 128 to signed
    else:
        codes = (word >> (LOW * SHIFT)) & MASK
        if HIGH > 0:
            H_MASK: tl.constexpr = ((1 << HIGH) - 1) * 0x01010101
            codes |= ((high >> (HIGH * quad)) & H_MASK) << LOW
    return codes


@triton.jit
def _codes(matrix, at, C: tl.constexpr, ASM: tl.constexpr):
    """Of groups of sixteen columns, (G,), and 16 rows: their codes, four words (G, 16) of four."""
    LOW: tl.constexpr = C[1]
    HIGH: tl.constexpr = C[2]
    row = tl.arange(0, 16)[None, :]
    inner = at % 2 * (LOW // 2)
    here = matrix.to(tl.pointer_type(tl.int32)) + (at // 2 * C[0])[:, None] + row
    high = at[:, None] + row
    if HIGH > 0:
        PER: tl.constexpr = 8 // HIGH
        first = at % 2 * 4
        high = tl.load(here + ((LOW + first // PER) * 16)[:, None])
        high = high >> (first % PER * HIGH)[:, None]
    word = tl.load(here + (inner * 16)[:, None])
    first_quad = _quad(word, high, 0, C, ASM)
    if LOW == 8:
        word = tl.load(here + ((inner + 1) * 16)[:, None])
    second = _quad(word, high, 1, C, ASM)
    if LOW == 8:
        word = tl.load(here + ((inner + 2) * 16)[:, None])
    elif LOW == 4:
        word = tl.load(here + ((inner + 1) * 16)[:, None])
    third = _quad(word, high, 2, C, ASM)
    if LOW == 8:
        word = tl.load(here + ((inner + 3) * 16)[:, None])
    return first_quad, second, third, _quad(word, high, 3, C, ASM)


@triton.jit
def _sums(a, b, c, d, words, stride, at, live, PLANES: tl.constexpr, SIGNED: tl.constexpr,
          ASM: tl.constexpr):  # fmt: skip
    """Codes times columns in units of the last plane, (G, 16) float32; integers, rounded once.
    a to d: of `_codes`; words: one token's planes of `stride` words."""
    pairs = words.to(tl.pointer_type(tl.int64)) + at * 2
    top = tl.zeros((at.shape[0], 16), tl.int32)
    middle = top
    bottom = top
    for plane in tl.static_range(PLANES):
        one = tl.load(pairs + plane * (stride // 2), mask=live, other=0)
        two = tl.load(pairs + plane * (stride // 2) + 1, mask=live, other=0)
        acc = _dp4a(a, one.to(tl.int32)[:, None], top * 0, SIGNED, ASM)
        acc = _dp4a(b, (one >> 32).to(tl.int32)[:, None], acc, SIGNED, ASM)
        acc = _dp4a(c, two.to(tl.int32)[:, None], acc, SIGNED, ASM)
        acc = _dp4a(d, (two >> 32).to(tl.int32)[:, None], acc, SIGNED, ASM)
        if plane == 0:
            top = acc
        elif plane == 1:
            middle = acc
        else:
            bottom = acc
    return top.to(tl.float32) * 65536.0 + (middle * 256 + bottom).to(tl.float32)


@triton.jit
def _token(
    a, b, c, d, scale, low, words, units, at, live, stride, C: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of `_codes` and one token with scales, minima and zeros, (G, 16) float32."""
    HALF: tl.constexpr = 0.5 if C[4] == 1 else 1.0  # of E2M1: codes are twice the value plus 12
    ZERO: tl.constexpr = 6 if C[4] == 1 else (0 if C[1] == 8 else C[3])
    pair = tl.load(units.to(tl.pointer_type(tl.int64)) + at, mask=live, other=0)
    unit = pair.to(tl.int32).to(tl.float32, bitcast=True)
    total = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    out = _sums(a, b, c, d, words, stride, at, live, PLANES, C[1] == 8, ASM)
    out *= (unit * HALF)[:, None]
    if ZERO > 0:
        out -= (total * ZERO)[:, None]
    out *= scale
    if C[5] == 1 or C[5] == 4 or C[5] == 5:  # they have a minimum
        out -= total[:, None] * low
    return out


@triton.jit
def _factors(records, at, C: tl.constexpr):
    """Scale and minimum of groups of sixteen columns (G,) and 16 rows."""
    part = at % 2 if C[6] == 2 else at * 0
    row = tl.arange(0, 16)[None, :]
    return factors(records, (at // 2)[:, None], row, part[:, None], C[5])


@triton.jit
def group_dots(
    first, second, words, units, group, groups, stride, payload_bytes, C: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Products of groups of sixteen columns, (G,), in two matrices' 16 rows of one format,
    (G, 16) float32 each. words, units: one token's planes of `stride` words and its units.
    Without TWO the second is left out.
    """
    live = group < groups
    at = tl.where(live, group, 0)
    a, b, c, d = _codes(first, at, C, ASM)
    scale, low = _factors(first + payload_bytes, at, C)
    value = _token(a, b, c, d, scale, low, words, units, at, live, stride, C, PLANES, ASM)
    value2 = value
    if TWO:
        a, b, c, d = _codes(second, at, C, ASM)
        scale, low = _factors(second + payload_bytes, at, C)
        value2 = _token(a, b, c, d, scale, low, words, units, at, live, stride, C, PLANES, ASM)
    return value, value2


@triton.jit
def group_dots_of_four(
    matrix, words, units, token, tokens, group, groups, stride, payload_bytes, C: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `group_dots` of one matrix for four tokens from `token` on: codes are taken apart once.
    words, units: of token 0. Beyond the last token the last one's products come again."""
    live = group < groups
    at = tl.where(live, group, 0)
    a, b, c, d = _codes(matrix, at, C, ASM)
    scale, low = _factors(matrix + payload_bytes, at, C)
    own = token * stride
    y0 = _token(
        a, b, c, d, scale, low, words + own * PLANES, units + own // 2, at, live, stride, C,
        PLANES, ASM,
    )  # fmt: skip
    own = tl.minimum(token + 1, tokens - 1) * stride
    y1 = _token(
        a, b, c, d, scale, low, words + own * PLANES, units + own // 2, at, live, stride, C,
        PLANES, ASM,
    )  # fmt: skip
    own = tl.minimum(token + 2, tokens - 1) * stride
    y2 = _token(
        a, b, c, d, scale, low, words + own * PLANES, units + own // 2, at, live, stride, C,
        PLANES, ASM,
    )  # fmt: skip
    own = tl.minimum(token + 3, tokens - 1) * stride
    y3 = _token(
        a, b, c, d, scale, low, words + own * PLANES, units + own // 2, at, live, stride, C,
        PLANES, ASM,
    )  # fmt: skip
    return y0, y1, y2, y3
