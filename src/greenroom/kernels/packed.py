"""How Triton kernels read packed weights: the constants of every block format and the device
functions that turn 64-byte lines into numbers (docs/slab-layout.md; csrc/formats is the same
knowledge for the CPU). A line is 16 rows x one 32-bit word.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

GROUP_ROWS = 16
BLOCK_COLS = 32

# Kinds of scale records; the numbers are only labels.
F16, F16_MIN, E8M0, UE4M3, K_MIN, K2_MIN, K_SIGNED16, K_SIGNED32 = range(8)
# Kinds of code tables.
LINEAR, E2M1, IQ4 = range(3)

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """One quantised format as kernels see it: x = scale * (code - zero) - min."""

    type: int  # ggml type number
    low_bits: int  # bits of a code in the first plane
    high_bits: int  # bits in the second plane, 0 if there is none
    zero: int
    table: int
    scales: int
    parts: int  # scales per 32 columns
    raw_cols: int  # columns of one scale record
    record_bytes: int

    @property
    def block_words(self) -> int:
        """32-bit words of 16 rows x 32 columns of codes."""
        return (self.low_bits + self.high_bits) * GROUP_ROWS

    def payload_bytes(self, cols: int) -> int:
        return cols // BLOCK_COLS * self.block_words * 4

    def group_bytes(self, cols: int) -> int:
        used = self.payload_bytes(cols) + cols // self.raw_cols * self.record_bytes
        return -(-used // 64) * 64


FORMATS = {
    f.type: f
    for f in (
        PackedFormat(2, 4, 0, 8, LINEAR, F16, 1, 32, 32),  # Q4_0
        PackedFormat(3, 4, 0, 0, LINEAR, F16_MIN, 1, 32, 64),  # Q4_1
        PackedFormat(6, 4, 1, 16, LINEAR, F16, 1, 32, 32),  # Q5_0
        PackedFormat(7, 4, 1, 0, LINEAR, F16_MIN, 1, 32, 64),  # Q5_1
        PackedFormat(8, 8, 0, 128, LINEAR, F16, 1, 32, 32),  # Q8_0
        PackedFormat(10, 2, 0, 0, LINEAR, K2_MIN, 2, 256, 320),  # Q2_K
        PackedFormat(11, 2, 1, 4, LINEAR, K_SIGNED16, 2, 256, 288),  # Q3_K
        PackedFormat(12, 4, 0, 0, LINEAR, K_MIN, 1, 256, 320),  # Q4_K
        PackedFormat(13, 4, 1, 0, LINEAR, K_MIN, 1, 256, 320),  # Q5_K
        PackedFormat(14, 4, 2, 32, LINEAR, K_SIGNED16, 2, 256, 288),  # Q6_K
        PackedFormat(20, 4, 0, 0, IQ4, F16, 1, 32, 32),  # IQ4_NL
        PackedFormat(23, 4, 0, 0, IQ4, K_SIGNED32, 1, 256, 160),  # IQ4_XS
        PackedFormat(39, 4, 0, 0, E2M1, E8M0, 1, 32, 16),  # MXFP4
        PackedFormat(40, 4, 0, 0, E2M1, UE4M3, 2, 64, 64),  # NVFP4
    )
}
FLOAT_BYTES = {0: 4, 1: 2, 30: 2}  # F32, F16, BF16: lines of one or two columns, no scales


@triton.jit
def _half(halves, index):
    return tl.load(halves + index).to(tl.float32)


@triton.jit
def factors(records, block, row, part, KIND: tl.constexpr):
    """Scale and min of the 16 rows of 32 columns' part; records: uint8 pointer to a group's
    scale plane, block: index of the 32 columns, row: 0..15, broadcast against each other."""
    # One way out: a compiled function must return the same types wherever it ends.
    low = 0.0
    halves = records.to(tl.pointer_type(tl.float16))
    if KIND == 0:  # F16
        scale = _half(halves, block * 16 + row)
    elif KIND == 1:  # F16_MIN
        scale = _half(halves, block * 32 + row)
        low = -_half(halves, block * 32 + 16 + row)
    elif KIND == 2:  # E8M0
        exponent = tl.load(records + block * 16 + row).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    elif KIND == 3:  # UE4M3: exponent bias 7 to 127
        byte = tl.load(records + block * 32 + 16 * part + row).to(tl.int32)
        scale = (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif KIND == 4:  # K_MIN
        at = block // 8 * 320
        inner = at + 64 + 16 * (block % 8) + row
        scale = _half(halves, at // 2 + row) * tl.load(records + inner).to(tl.float32)
        low = _half(halves, at // 2 + 16 + row) * tl.load(records + inner + 128).to(tl.float32)
    elif KIND == 5:  # K2_MIN
        at = block // 8 * 320
        inner = at + 64 + 16 * (2 * (block % 8) + part) + row
        byte = tl.load(records + inner).to(tl.int32)
        scale = _half(halves, at // 2 + row) * (byte & 15).to(tl.float32)
        low = _half(halves, at // 2 + 16 + row) * (byte >> 4).to(tl.float32)
    elif KIND == 6:  # K_SIGNED16
        at = block // 8 * 288
        byte = tl.load(records + at + 32 + 16 * (2 * (block % 8) + part) + row)
        scale = _half(halves, at // 2 + row) * byte.to(tl.int8, bitcast=True).to(tl.float32)
    else:  # K_SIGNED32
        at = block // 8 * 160
        byte = tl.load(records + at + 32 + 16 * (block % 8) + row)
        scale = _half(halves, at // 2 + row) * byte.to(tl.int8, bitcast=True).to(tl.float32)
    return scale, low
