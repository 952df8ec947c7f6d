"""Packed weights to plain row-major floats on the GPU, for products of many tokens.

The scratch matrix it fills is multiplied by the vendor's dense routine; one expert at a time keeps
it small. Weights lie as docs/slab-layout.md says.
"""

import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.matvec import iq4_table
from greenroom.kernels.packed import FORMATS, code, factors, number

BLOCKS = 16  # blocks of 32 columns per program


@triton.jit
def _dequantise(
    packed,
    out,
    iq4,
    rows,
    blocks,
    group_bytes,
    payload_bytes,
    BLOCK_WORDS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    TABLE: tl.constexpr,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    group = packed + tl.program_id(0).to(tl.int64) * group_bytes
    row = tl.arange(0, 16)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    at = tl.where(inside, block, 0)
    words = group.to(tl.pointer_type(tl.int32)) + at[:, None] * BLOCK_WORDS + row[None, :]
    index = tl.program_id(0) * 16 + row
    live = inside[:, None] & (index < rows)[None, :]
    line = out + index[None, :].to(tl.int64) * blocks * 32 + at[:, None] * 32
    for part in tl.static_range(PARTS):
        scale, low = factors(group + payload_bytes, at[:, None], row[None, :], part, SCALES)
        for quad in tl.static_range(part * (8 // PARTS), (part + 1) * (8 // PARTS)):
            for byte in tl.static_range(4):
                value = number(code(words, quad, byte, LOW, HIGH), iq4, ZERO, TABLE)
                tl.store(line + 4 * quad + byte, value * scale - low, mask=live)


def dequantise(packed: Tensor, kind: int, out: Tensor) -> Tensor:
    """Fills `out` with the numbers of a packed matrix and returns it.

    Args:
        packed: (bytes,) uint8, a matrix of out's shape and quantised type `kind` (ggml number).
        out: (rows, cols) float32, bfloat16 or float16, contiguous.
    """
    form = FORMATS[kind]
    rows, cols = out.shape
    blocks = cols // 32
    _dequantise[(-(-rows // 16), -(-blocks // BLOCKS))](
        packed, out, iq4_table(out.device), rows, blocks, form.group_bytes(cols),
        form.payload_bytes(cols), BLOCK_WORDS=form.block_words, LOW=form.low_bits,
        HIGH=form.high_bits, ZERO=form.zero, TABLE=form.table, SCALES=form.scales,
        PARTS=form.parts, BLOCKS=BLOCKS,
    )  # fmt: skip
    return out
