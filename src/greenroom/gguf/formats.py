"""Block formats in NumPy: raw bytes to float32, the reference every kernel is held against.

Each format is one function from blocks `(n, block_bytes)` uint8 to `(n, block_size)` float32.
The order of the multiplications is the one of `gguf.quants`, so results are equal bit by
bit. Knows nothing of files; types outside the table below are handed to `gguf.quants`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from greenroom.errors import UnsupportedModelError
from greenroom.gguf.repack import repack_pairs
from greenroom.gguf.types import GGMLType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Blocks are decoded in portions of about this many elements, so that temporaries stay in
# the cache and a large matrix needs no multiple of its own size.
PORTION = 1 << 18

# E2M1 values times two (OCP Microscaling 1.0), and the levels of IQ4_NL and IQ4_XS.
FP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def dequantize(type: GGMLType, raw: npt.NDArray[np.uint8]) -> Floats:
    """Decodes rows of blocks.

    Args:
        type: the blocks' format.
        raw: `(..., row_bytes)` uint8.

    Returns:
        `(..., elements)` float32.

    Raises:
        ValueError: the rows are not whole blocks.
        UnsupportedModelError: nothing can decode this type.
    """
    if raw.dtype != np.uint8 or raw.ndim < 1 or raw.shape[-1] % type.block_bytes:
        raise ValueError(
            f"{type.name} rows must be uint8 in multiples of {type.block_bytes} bytes, not "
            f"{raw.dtype} {raw.shape}"
        )
    decode = DECODERS[type] if type in DECODERS else _peer_decoder(type)
    shape = (*raw.shape[:-1], raw.shape[-1] // type.block_bytes * type.block_size)
    blocks = np.ascontiguousarray(raw).reshape(-1, type.block_bytes)
    out = np.empty((len(blocks), type.block_size), np.float32)
    step = max(1, PORTION // type.block_size)
    # Extreme scales overflow to infinities and NaNs here as they do in every kernel.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(shape)


def _peer_decoder(type: GGMLType) -> Callable[[Bytes], Floats]:
    """The decoder of `gguf.quants`, imported only for the rare types that need it."""
    import gguf

    try:
        peer = gguf.GGMLQuantizationType(type)
        gguf.quants.dequantize(np.zeros((1, type.block_bytes), np.uint8), peer)
    except (ValueError, NotImplementedError):
        raise UnsupportedModelError(
            f"tensors of type {type.name} cannot be decoded; get the model in another type, "
            "for example Q4_K, Q8_0 or MXFP4"
        ) from None
    return lambda blocks: np.asarray(gguf.quants.dequantize(blocks, peer), np.float32)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, `(n, 1)`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def nibbles(packed: Bytes, run: int) -> Bytes:
    """Low, then high nibbles of each run of `run` bytes: `(n, m)` to `(n, 2m)`."""
    n = len(packed)
    groups = packed.reshape(n, -1, 1, run)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(n, -1)


def bits(packed: Bytes, width: int) -> Bytes:
    """Fields of `width` bits, all bytes' lowest fields first: `(n, m)` to `(n, 8 / width, m)`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: Bytes = (packed[:, None, :] >> shifts) & np.uint8((1 << width) - 1)
    return fields


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4")


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 2:], 16).astype(np.int8) - 8
    return _half(blocks, 0) * codes.astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 4:], 16).astype(np.float32)
    return _half(blocks, 0) * codes + _half(blocks, 2)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bit j of a little-endian 32-bit mask, as 16 or 0: `(n, 4)` to `(n, 32)`."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.astype(np.int8) - 16).astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    codes = nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q2_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    low = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    codes = bits(blocks[:, 16:80].reshape(2 * n, 32), 2).reshape(n, 16, 16)
    values = scale[:, :, None] * codes.astype(np.float32) - low[:, :, None]
    return values.reshape(n, 256)


def _q3_k_scales(packed: Bytes) -> npt.NDArray[np.int8]:
    """The sixteen 6-bit scales of Q3_K: `(n, 12)` to `(n, 16)`, with 32 taken off."""
    low = nibbles(packed[:, :8], 8)
    high = bits(packed[:, 8:], 2).reshape(-1, 16)
    return (low | high << 4).astype(np.int8) - np.int8(32)


def _q3_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    scale = _half(blocks, 108) * _q3_k_scales(blocks[:, 96:108]).astype(np.float32)
    low = bits(blocks[:, 32:96].reshape(2 * n, 32), 2).reshape(n, 16, 16)
    high = bits(blocks[:, :32], 1).reshape(n, 16, 16)
    codes = (low | high << 2).astype(np.int8) - 4
    return (scale[:, :, None] * codes.astype(np.float32)).reshape(n, 256)


def k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight 6-bit scales and mins of Q4_K and Q5_K: `(n, 12)` to twice `(n, 8)`."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, mins


def _affine_k(blocks: Bytes, codes: Bytes) -> Floats:
    """Q4_K's and Q5_K's common part: scale and min of each of eight runs of 32 codes."""
    n = len(blocks)
    scales, mins = k_scales(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    low = _half(blocks, 2) * mins.astype(np.float32)
    values = scale[:, :, None] * codes.reshape(n, 8, 32).astype(np.float32) - low[:, :, None]
    return values.reshape(n, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _affine_k(blocks, nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Bytes) -> Floats:
    high = bits(blocks[:, 16:48], 1).reshape(-1, 256)
    return _affine_k(blocks, nibbles(blocks[:, 48:], 32) | high << np.uint8(4))


def _q6_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    low = nibbles(blocks[:, :128], 64).reshape(n, 256)
    high = bits(blocks[:, 128:192].reshape(2 * n, 32), 2).reshape(n, 256)
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    return (scale[:, :, None] * codes.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


def _iq4_nl(blocks: Bytes) -> Floats:
    levels: Floats = IQ4_LEVELS[nibbles(blocks[:, 2:], 16)]
    return _half(blocks, 0) * levels


def _iq4_xs(blocks: Bytes) -> Floats:
    n = len(blocks)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(n, 8)
    scales = (low | (high & 3).astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 0) * scales.astype(np.float32)
    levels = IQ4_LEVELS[nibbles(blocks[:, 8:], 16)].reshape(n, 8, 32)
    values: Floats = (scale[:, :, None] * levels).reshape(n, 256)
    return values


def _e8m0_table() -> Floats:
    """Half of 2^(e - 127) for each exponent byte e; 0 and 1 give subnormals."""
    exponents = np.arange(256, dtype=np.float64) - 128
    return np.exp2(exponents).astype(np.float32)


def _ue4m3_table() -> Floats:
    """Half of each unsigned E4M3 number; 0x7F, its NaN, counts as zero as in ggml."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, (code & 7).astype(np.float64)
    normal = (1 + fraction / 8) * np.exp2(exponent - 7.0)
    value = np.where(exponent == 0, fraction * 2.0**-9, normal)
    value[0x7F] = 0
    return (value / 2).astype(np.float32)


E8M0_HALVES = _e8m0_table()
UE4M3_HALVES = _ue4m3_table()


def _mxfp4(blocks: Bytes) -> Floats:
    scale: Floats = E8M0_HALVES[blocks[:, :1]]
    levels: Floats = FP4_LEVELS[nibbles(blocks[:, 1:], 16)]
    return scale * levels


def _mxfp4_pairs(blocks: Bytes) -> Floats:
    return _mxfp4(repack_pairs(blocks))


def _nvfp4(blocks: Bytes) -> Floats:
    n = len(blocks)
    levels = FP4_LEVELS[nibbles(blocks[:, 4:], 8)].reshape(n, 4, 16)
    return (UE4M3_HALVES[blocks[:, :4]][:, :, None] * levels).reshape(n, 64)


DECODERS: dict[GGMLType, Callable[[Bytes], Floats]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.MXFP4_PAIRS: _mxfp4_pairs,
    GGMLType.NVFP4: _nvfp4,
}
