"""The numbers of the GGUF format: tensor types with their block sizes, metadata value types.

Knows sizes only; how a block is decoded stands in `formats.py`, how a file is read in
`reader.py`.
"""

from enum import IntEnum

import numpy as np


class GGMLType(IntEnum):
    """A tensor's element type: `block_size` elements are stored in `block_bytes` bytes.

    Blocks run along the contiguous dimension only, so a row is a whole number of blocks.
    The numbers are ggml's (`enum ggml_type`).
    """

    block_size: int
    block_bytes: int

    def __new__(cls, number: int, block_size: int = 1, block_bytes: int = 1) -> "GGMLType":
        """Makes the member `number`; the sizes become its attributes."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    # ggml removed its own type 4 in 2023; Ollama writes MXFP4 under this number, with
    # another order of the nibbles (`repack_pairs` in repack.py changes it).
    MXFP4_PAIRS = 4, 32, 17
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of `elements` values.

        Raises:
            ValueError: `elements` is not a whole number of blocks.
        """
        if elements % self.block_size:
            raise ValueError(
                f"{elements} elements are not a multiple of {self.name}'s block of "
                f"{self.block_size}"
            )
        return elements // self.block_size * self.block_bytes


# Types that ggml once had; files with them exist and cannot be read any more.
REMOVED_TYPES = {
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


class ValueType(IntEnum):
    """The type of a metadata value."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


# Types of fixed size, as little-endian NumPy types; a bool is one byte.
SCALAR_DTYPES: dict[ValueType, np.dtype[np.generic]] = {
    ValueType.U8: np.dtype("u1"),
    ValueType.I8: np.dtype("i1"),
    ValueType.U16: np.dtype("<u2"),
    ValueType.I16: np.dtype("<i2"),
    ValueType.U32: np.dtype("<u4"),
    ValueType.I32: np.dtype("<i4"),
    ValueType.F32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("u1"),
    ValueType.U64: np.dtype("<u8"),
    ValueType.I64: np.dtype("<i8"),
    ValueType.F64: np.dtype("<f8"),
}

# What a count may be stored as.
INTEGERS = frozenset(
    type for type, dtype in SCALAR_DTYPES.items() if dtype.kind in "iu" and type != ValueType.BOOL
)

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
