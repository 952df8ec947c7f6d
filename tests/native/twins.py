"""Plain NumPy twins of the native kernels, and the bounds their results are held to."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from greenroom.gguf import GGMLType, dequantize, random_blocks

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]

FLOATING = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
NATIVE = (
    *FLOATING,
    *(GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0),
    *(GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
    *(GGMLType.IQ4_NL, GGMLType.IQ4_XS, GGMLType.MXFP4, GGMLType.NVFP4),
)


def quantised(x: Floats) -> Wide:
    """What the kernels compute with: 16 bits with one scale per 32 columns. x: (tokens, cols)."""
    blocks = x.reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(32512), peak, out=np.zeros_like(peak), where=peak > 1e-30)
    codes = blocks * inverse
    high = np.rint(codes / 256)
    low = np.rint(np.clip(codes - 256 * high, -127, 127))
    return ((256.0 * high + low) * (peak / np.float32(32512))).reshape(x.shape)


def as_bytes(x: Floats) -> Wide:
    """The same in AMX tiles of int8: every value the nearest, one scale per 512 columns."""
    tokens, cols = x.shape
    ranges = np.pad(x, ((0, 0), (0, -cols % 512))).reshape(tokens, -1, 512)
    peak = np.abs(ranges).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(32512), peak, out=np.zeros_like(peak), where=peak > 1e-30)
    scale = (peak / np.float32(32512)).astype(np.float64)
    return (np.rint(ranges * inverse) * scale).reshape(tokens, -1)[:, :cols]


def seen_by(type: GGMLType, x: Floats) -> Wide:
    """The activations as a matrix of this type sees them."""
    return x.astype(np.float64) if type in FLOATING else quantised(x)


@contextmanager
def tiles(lib, on: bool) -> Iterator[None]:
    """Many tokens in AMX tiles, or not, for as long as it lasts; other tiers have none."""
    if not hasattr(lib, "_use_tiles"):
        yield
        return
    before = lib._use_tiles(on)
    try:
        yield
    finally:
        lib._use_tiles(before)


class Matrix:
    """A random matrix: raw as in a file, packed by one tier, and as float64 values."""

    def __init__(self, lib, pool, type: GGMLType, rows: int, cols: int, seed: int = 0) -> None:
        self.type, self.rows, self.cols = type, rows, cols
        self.raw = random_blocks(type, rows, cols, np.random.default_rng([seed, rows, cols]))
        self.packed = np.full(lib.packed_bytes(int(type), rows, cols), 0xAB, np.uint8)
        self.pack(lib, pool)

    def pack(self, lib, pool) -> None:
        """Everything follows what raw is now."""
        self.values = dequantize(self.type, self.raw).astype(np.float64)
        lib.pack(pool, int(self.type), self.rows, self.cols, self.raw.reshape(-1), self.packed)

    def product(self, x: Floats) -> tuple[Wide, Wide]:
        """x W^T in float64 with the kernel's activations, and the bound for float32 sums."""
        seen = seen_by(self.type, x)
        size = np.abs(x).astype(np.float64) @ np.abs(self.values).T
        # A zero point or minimum is subtracted after summation: the terms before that are up to
        # 16 times as large as what remains of them.
        slack = (self.cols + 8) * 2.0**-24 if self.type in FLOATING else 16 * 2.0**-20
        return seen @ self.values.T, slack * size + 1e-30


def activation(kind: str, gate: Wide, up: Wide) -> Wide:
    if kind == "gpt-oss":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return gate / (1 + np.exp(-gate)) * up
