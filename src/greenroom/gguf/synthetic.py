"""Random weights as valid raw blocks, made fast enough for files of many gigabytes.

Payloads are random bits; scales are set so that the decoded numbers have mean zero and the
standard deviation asked for. Nothing is quantised. Knows formats, not models.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from greenroom.errors import UnsupportedModelError
from greenroom.gguf.formats import E8M0_HALVES, FP4_LEVELS, UE4M3_HALVES, dequantize
from greenroom.gguf.quantizers import quantize
from greenroom.gguf.types import GGMLType

Bytes = npt.NDArray[np.uint8]
_Rescale = Callable[[Bytes, float, np.random.Generator], None]

_CHUNK_BLOCKS = 1 << 16


def random_blocks(
    type: GGMLType, rows: int, cols: int, rng: np.random.Generator, scale: float | None = None
) -> Bytes:
    """Raw blocks of a random matrix.

    Args:
        type: any type with a decoder of ours, `MXFP4_PAIRS` included.
        rows: rows of the matrix.
        cols: elements of a row, whole blocks.
        rng: the source of the bits; the same state gives the same bytes.
        scale: standard deviation of the numbers; default `cols ** -0.5`, which keeps a
            product with the matrix at the size of its input.

    Returns:
        `(rows, row_bytes)` uint8.

    Raises:
        ValueError: rows are not whole blocks.
        UnsupportedModelError: the type is none that can be made.
    """
    row_bytes = type.row_bytes(cols)
    deviation = cols**-0.5 if scale is None else scale
    if type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        return _random_floats(type, rows * cols, deviation, rng).reshape(rows, row_bytes)
    if type not in _RESCALERS:
        raise UnsupportedModelError(
            f"random {type.name} weights cannot be made; "
            f"these can: F32, F16, BF16, {', '.join(t.name for t in _RESCALERS)}"
        )
    size = rows * row_bytes
    words = rng.integers(0, 1 << 64, -(-size // 8), np.uint64)
    blocks = words.view(np.uint8)[:size].reshape(-1, type.block_bytes)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        _RESCALERS[type](blocks[start : start + _CHUNK_BLOCKS], deviation, rng)
    return blocks.reshape(rows, row_bytes)


def _random_floats(type: GGMLType, count: int, deviation: float, rng: np.random.Generator) -> Bytes:
    if type == GGMLType.F32:
        values = rng.standard_normal(count, np.float32)
        values *= np.float32(deviation)
        return values.view(np.uint8)
    # 65,536 different numbers are as random as two bytes can be, and a table is faster.
    table = np.random.default_rng(0).standard_normal((1 << 16, 1), np.float32)
    table *= np.float32(deviation / table.std())
    encoded = quantize(type, table).view(np.uint16)[:, 0]
    picks = rng.integers(0, 1 << 64, -(-count // 4), np.uint64).view(np.uint16)[:count]
    return encoded[picks].view(np.uint8)


@cache
def _half_table(mean: float) -> npt.NDArray[np.uint16]:
    """256 float16 around `mean`, from 0.5 to 1.5 times it, as bits."""
    return (np.linspace(0.5, 1.5, 256) * mean).astype("<f2").view(np.uint16)


# The mean square of 256 steps from 0.5 to 1.5.
_SPREAD = math.sqrt(float((np.linspace(0.5, 1.5, 256) ** 2).mean()))


def _put_half(blocks: Bytes, at: int, words: npt.NDArray[np.uint16]) -> None:
    blocks[:, at : at + 2] = words.view(np.uint8).reshape(-1, 2)


def _pick(count: int, rng: np.random.Generator) -> Bytes:
    return np.frombuffer(rng.bytes(count), np.uint8)


@cache
def _unit_deviation(type: GGMLType, at: int) -> float:
    """Root mean square of random codes of `type` when the float16 at byte `at` is 1."""
    sample = np.random.default_rng(0).integers(0, 256, (4096, type.block_bytes), np.uint8)
    _put_half(sample, at, np.ones(4096, "<f2").view(np.uint16))
    return float(np.sqrt((dequantize(type, sample).astype(np.float64) ** 2).mean()))


def _signed(type: GGMLType, at: int) -> _Rescale:
    """One float16 at byte `at`; its random sign brings the mean to zero."""

    def rescale(blocks: Bytes, deviation: float, rng: np.random.Generator) -> None:
        table = _half_table(deviation / _unit_deviation(type, at) / _SPREAD)
        words = table[_pick(len(blocks), rng)]
        words ^= blocks[:, at].astype(np.uint16) << 15
        _put_half(blocks, at, words)

    return rescale


def _with_minimum(at: int, minimum_at: int, top: int, deviation: float, sign: int) -> _Rescale:
    """A float16 for the scale and one for the minimum, which is half the range of codes.

    Args:
        at: byte of the scale.
        minimum_at: byte of the minimum.
        top: the largest code; codes 0..top are equally frequent.
        deviation: root mean square of the decoded numbers at scale 1.
        sign: of the stored minimum: -1 where it is added, 1 where it is subtracted.
    """

    def rescale(blocks: Bytes, wanted: float, rng: np.random.Generator) -> None:
        picks = _pick(len(blocks), rng)
        mean = wanted / deviation / _SPREAD
        _put_half(blocks, at, _half_table(mean)[picks])
        _put_half(blocks, minimum_at, _half_table(sign * mean * top / 2)[picks])

    return rescale


def _code_deviation(top: int) -> float:
    """Standard deviation of uniform codes 0..top."""
    return math.sqrt(((top + 1) ** 2 - 1) / 12)


def _equal_k_scales(rescale: _Rescale) -> _Rescale:
    """Q4_K and Q5_K: gives every run the same number for scale and minimum."""

    def both(blocks: Bytes, deviation: float, rng: np.random.Generator) -> None:
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = (blocks[:, 12:16] & 15) * np.uint8(17)
        rescale(blocks, deviation, rng)

    return both


def _equal_q2_scales(rescale: _Rescale) -> _Rescale:
    """Q2_K: the same number for scale and minimum of every run."""

    def both(blocks: Bytes, deviation: float, rng: np.random.Generator) -> None:
        blocks[:, :16] = (blocks[:, :16] & 15) * np.uint8(17)
        rescale(blocks, deviation, rng)

    return both


def _uniform_rms(top: int) -> float:
    """Root mean square of uniform numbers 0..top."""
    return math.sqrt(float((np.arange(top + 1.0) ** 2).mean()))


_FP4_RMS = math.sqrt(float((FP4_LEVELS.astype(np.float64) ** 2).mean()))


def _neighbours(table: npt.NDArray[np.float32], target: float) -> tuple[int, npt.NDArray[np.uint8]]:
    """The last entry not above `target`, and 256 choices (0, 1) of it or the next one.

    The share of the next one makes the mean square that of `target`.
    """
    low = int(np.clip(np.searchsorted(table, target, side="right") - 1, 0, len(table) - 2))
    small, large = float(table[low]) ** 2, float(table[low + 1]) ** 2
    share = (target**2 - small) / (large - small)
    choices = np.arange(256) < round(256 * min(max(share, 0), 1))
    return low, choices.astype(np.uint8)


def _fp4(scales: int, table: npt.NDArray[np.float32]) -> _Rescale:
    """Scales of one byte each in the first `scales` bytes, growing with `table`."""

    def rescale(blocks: Bytes, deviation: float, rng: np.random.Generator) -> None:
        low, choices = _neighbours(table, deviation / _FP4_RMS)
        blocks[:, :scales] = np.uint8(low) + choices[blocks[:, :scales]]

    return rescale


_Q2_K = _with_minimum(80, 82, 3, _uniform_rms(15) * _code_deviation(3), 1)
_Q4_K = _with_minimum(0, 2, 15, _uniform_rms(63) * _code_deviation(15), 1)
_Q5_K = _with_minimum(0, 2, 31, _uniform_rms(63) * _code_deviation(31), 1)

_RESCALERS: dict[GGMLType, _Rescale] = {
    GGMLType.Q4_0: _signed(GGMLType.Q4_0, 0),
    GGMLType.Q4_1: _with_minimum(0, 2, 15, _code_deviation(15), -1),
    GGMLType.Q5_0: _signed(GGMLType.Q5_0, 0),
    GGMLType.Q5_1: _with_minimum(0, 2, 31, _code_deviation(31), -1),
    GGMLType.Q8_0: _signed(GGMLType.Q8_0, 0),
    GGMLType.Q2_K: _equal_q2_scales(_Q2_K),
    GGMLType.Q3_K: _signed(GGMLType.Q3_K, 108),
    GGMLType.Q4_K: _equal_k_scales(_Q4_K),
    GGMLType.Q5_K: _equal_k_scales(_Q5_K),
    GGMLType.Q6_K: _signed(GGMLType.Q6_K, 208),
    GGMLType.IQ4_NL: _signed(GGMLType.IQ4_NL, 0),
    GGMLType.IQ4_XS: _signed(GGMLType.IQ4_XS, 0),
    GGMLType.MXFP4: _fp4(1, E8M0_HALVES[:255]),
    GGMLType.MXFP4_PAIRS: _fp4(1, E8M0_HALVES[:255]),
    GGMLType.NVFP4: _fp4(4, UE4M3_HALVES[:0x7F]),
}
