"""Float32 to block formats in NumPy: plain round-to-nearest, for tests and small models.

Each format is a function from `(n, block_size)` float32 to blocks `(n, block_bytes)` uint8;
what is not here but in `gguf.quants` (TQ1_0, TQ2_0) is handed to it. The scales fit the
largest value of a run and are not searched further, so llama.cpp's K-quants are a little better.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from greenroom.errors import UnsupportedModelError
from greenroom.gguf.formats import (
    E8M0_HALVES,
    FP4_LEVELS,
    IQ4_LEVELS,
    PORTION,
    UE4M3_HALVES,
    Bytes,
    Floats,
)
from greenroom.gguf.types import GGMLType

_FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def quantize(type: GGMLType, values: npt.NDArray[np.floating]) -> Bytes:
    """Encodes rows of numbers.

    Args:
        type: the format wanted.
        values: `(..., elements)` of any float type; finite unless `type` is a float type.

    Returns:
        `(..., row_bytes)` uint8.

    Raises:
        ValueError: rows are not whole blocks, or values are not finite.
        UnsupportedModelError: this type can be read but not written.
    """
    if values.ndim < 1 or values.shape[-1] % type.block_size:
        raise ValueError(
            f"{type.name} rows must be multiples of {type.block_size} elements, not {values.shape}"
        )
    encode = ENCODERS[type] if type in ENCODERS else _peer_encoder(type)
    shape = (*values.shape[:-1], type.row_bytes(values.shape[-1]))
    blocks = values.reshape(-1, type.block_size)
    out = np.empty((len(blocks), type.block_bytes), np.uint8)
    step = max(1, PORTION // type.block_size)
    for start in range(0, len(blocks), step):
        portion = np.ascontiguousarray(blocks[start : start + step], np.float32)
        if type not in _FLOAT_TYPES and not np.isfinite(portion).all():
            raise ValueError(f"infinite or NaN values cannot be stored as {type.name}")
        out[start : start + step] = encode(portion)
    return out.reshape(shape)


def _peer_encoder(type: GGMLType) -> Callable[[Floats], Bytes]:
    """The encoder of `gguf.quants`, imported when it is needed."""
    import gguf

    try:
        peer = gguf.GGMLQuantizationType(type)
        gguf.quants.quantize(np.zeros((1, type.block_size), np.float32), peer)
    except (ValueError, NotImplementedError):
        raise UnsupportedModelError(
            f"{type.name} can be read but not written; write {', '.join(t.name for t in ENCODERS)}"
        ) from None
    return lambda blocks: np.asarray(gguf.quants.quantize(blocks, peer), np.uint8)


def _bytes_of(values: npt.NDArray[np.generic], rows: int) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8).reshape(rows, -1)


def _half(values: Floats) -> tuple[Bytes, Floats]:
    """Scales `(n,)` as float16 bytes `(n, 2)`, and what they decode to."""
    with np.errstate(over="ignore"):
        stored = np.minimum(np.abs(values), 65504).astype("<f2") * np.sign(values).astype("<f2")
    return _bytes_of(stored, len(values)), stored.astype(np.float32)


def _ratio(values: Floats, scale: Floats) -> Floats:
    """`values / scale`, and 0 where the scale is 0."""
    out = np.zeros(np.broadcast_shapes(values.shape, scale.shape), np.float32)
    with np.errstate(over="ignore"):
        np.divide(values, scale, out=out, where=np.broadcast_to(scale != 0, out.shape))
    return out


def _codes(values: Floats, low: int, high: int) -> npt.NDArray[np.int16]:
    return np.clip(np.rint(values), low, high).astype(np.int16)


def _extreme(runs: Floats) -> Floats:
    """The value of largest magnitude, with its sign, along the last axis."""
    at = np.abs(runs).argmax(axis=-1)[..., None]
    return np.take_along_axis(runs, at, axis=-1)[..., 0]


def pack_nibbles(codes: npt.NDArray[np.integer], run: int) -> Bytes:
    """The inverse of `formats.nibbles`: `(n, 2m)` to `(n, m)`."""
    groups = codes.astype(np.uint8).reshape(len(codes), -1, 2, run)
    packed = (groups[:, :, 0] & np.uint8(15)) | (groups[:, :, 1] << np.uint8(4))
    return packed.reshape(len(codes), -1)


def pack_bits(fields: npt.NDArray[np.integer], width: int) -> Bytes:
    """The inverse of `formats.bits`: `(n, 8 / width, m)` to `(n, m)`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(fields.astype(np.uint8) << shifts, axis=1)
    return packed


def nearest(values: Floats, levels: Floats) -> npt.NDArray[np.intp]:
    """Index of the nearest of ascending `levels`; the lower one of two equally near."""
    edges = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(edges, values, side="left")


def _nearest_fp4(values: Floats) -> Bytes:
    """E2M1 codes of values in units of `FP4_LEVELS`; ties go towards zero."""
    codes = nearest(np.abs(values), FP4_LEVELS[:8]).astype(np.uint8)
    return codes | ((values < 0) & (codes > 0)).astype(np.uint8) << np.uint8(3)


def _f32(blocks: Floats) -> Bytes:
    return _bytes_of(blocks.astype("<f4"), len(blocks))


def _f16(blocks: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        return _bytes_of(blocks.astype("<f2"), len(blocks))


def _bf16(blocks: Floats) -> Bytes:
    word = blocks.view(np.uint32)
    rounded = (word + (0x7FFF + (word >> 16 & 1))) >> 16  # to nearest, ties to even
    quiet = word >> 16 | 0x40
    return _bytes_of(np.where(np.isnan(blocks), quiet, rounded).astype("<u2"), len(blocks))


def _inverse(scale: Floats) -> Floats:
    # The inverse of a subnormal scale could be infinite; stored as float16 it is 0 anyway.
    normal = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=normal)


def _f16_bytes(values: Floats) -> Bytes:
    with np.errstate(over="ignore"):
        return _bytes_of(values.astype("<f2"), len(values))


def _pack_32(codes: npt.NDArray[np.integer], top: int) -> list[Bytes]:
    """The bytes of 32 codes of four or five bits; the fifth bits go first."""
    packed = pack_nibbles(codes & 15, 16)
    if top == 15:
        return [packed]
    return [np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little"), packed]


def _centred_32(blocks: Floats, top: int) -> Bytes:
    """Q4_0 and Q5_0: the extreme value becomes code 0, zero the middle; as in ggml."""
    middle = (top + 1) // 2
    scale = _extreme(blocks)[:, None] / np.float32(-middle)
    codes = np.trunc(blocks * _inverse(scale) + np.float32(middle + 0.5)).astype(np.int16)
    return np.concatenate([_f16_bytes(scale), *_pack_32(codes.clip(0, top), top)], axis=1)


def _ranged_32(blocks: Floats, top: int) -> Bytes:
    """Q4_1 and Q5_1: from the smallest value, code 0, to the largest; as in ggml."""
    low = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((blocks - low) * _inverse(scale) + np.float32(0.5)).astype(np.int16)
    packed = _pack_32(codes.clip(0, top), top)
    return np.concatenate([_f16_bytes(scale), _f16_bytes(low), *packed], axis=1)


def _q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))  # halves go away from zero, as in ggml
    return np.concatenate([_f16_bytes(scale), codes.astype(np.int8).view(np.uint8)], axis=1)


def _affine(
    blocks: Floats, run: int, top: int, scale_top: int
) -> tuple[Bytes, Bytes, Bytes, Bytes, npt.NDArray[np.int16]]:
    """Codes 0..top with scale and min per run, both in units of two float16 per block.

    Returns:
        d, dmin `(n, 2)`; scales, mins `(n, runs)`; codes `(n, runs, run)`.
    """
    runs = blocks.reshape(len(blocks), -1, run)
    low = np.maximum(-runs.min(axis=2), 0)
    scale = (runs.max(axis=2) + low).clip(0) / top
    d, unit = _half(scale.max(axis=1) / scale_top)
    dmin, low_unit = _half(low.max(axis=1) / scale_top)
    scales = _codes(_ratio(scale, unit[:, None]), 0, scale_top)
    mins = _codes(_ratio(low, low_unit[:, None]), 0, scale_top)
    shifted = runs + (low_unit[:, None] * mins)[:, :, None]
    codes = _codes(_ratio(shifted, (unit[:, None] * scales)[:, :, None]), 0, top)
    return d, dmin, scales.astype(np.uint8), mins.astype(np.uint8), codes


def _symmetric(
    blocks: Floats, run: int, bottom: int, scale_top: int
) -> tuple[Bytes, npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Codes -bottom..bottom-1 with a signed scale per run, in units of one float16 per block.

    Returns:
        d `(n, 2)`; scales `(n, runs)`; codes `(n, runs, run)`.
    """
    runs = blocks.reshape(len(blocks), -1, run)
    scale = _extreme(runs) / np.float32(-bottom)
    d, unit = _half(np.abs(scale).max(axis=1) / scale_top)
    scales = _codes(_ratio(scale, unit[:, None]), -scale_top - 1, scale_top)
    steps = unit[:, None] * scales.astype(np.float32)
    codes = _codes(_ratio(runs, steps[:, :, None]), -bottom, bottom - 1)
    return d, scales, codes


def _q2_k(blocks: Floats) -> Bytes:
    n = len(blocks)
    d, dmin, scales, mins, codes = _affine(blocks, 16, 3, 15)
    packed = pack_bits(codes.reshape(2 * n, 4, 32), 2).reshape(n, 64)
    return np.concatenate([scales | mins << np.uint8(4), packed, d, dmin], axis=1)


def _q3_k(blocks: Floats) -> Bytes:
    n = len(blocks)
    d, scales, signed = _symmetric(blocks, 16, 4, 31)
    codes = signed + 4
    low = pack_bits((codes & 3).reshape(2 * n, 4, 32), 2).reshape(n, 64)
    high = pack_bits((codes >> 2).reshape(n, 8, 32), 1)
    stored = scales + 32
    scale_bytes = [pack_nibbles(stored & 15, 8), pack_bits((stored >> 4).reshape(n, 4, 4), 2)]
    return np.concatenate([high, low, *scale_bytes, d], axis=1)


def pack_k_scales(scales: Bytes, mins: Bytes) -> Bytes:
    """The inverse of `formats.k_scales`: twice `(n, 8)`, below 64, to `(n, 12)`."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | mins[:, 4:] << 4
    return np.concatenate([first, second, third], axis=1)


def _q4_k(blocks: Floats) -> Bytes:
    d, dmin, scales, mins, codes = _affine(blocks, 32, 15, 63)
    packed = pack_nibbles(codes.reshape(-1, 256), 32)
    return np.concatenate([d, dmin, pack_k_scales(scales, mins), packed], axis=1)


def _q5_k(blocks: Floats) -> Bytes:
    d, dmin, scales, mins, codes = _affine(blocks, 32, 31, 63)
    high = pack_bits(codes >> 4, 1)
    low = pack_nibbles(codes.reshape(-1, 256) & 15, 32)
    return np.concatenate([d, dmin, pack_k_scales(scales, mins), high, low], axis=1)


def _q6_k(blocks: Floats) -> Bytes:
    n = len(blocks)
    d, scales, signed = _symmetric(blocks, 16, 32, 127)
    codes = (signed + 32).reshape(n, 256)
    low = pack_nibbles(codes & 15, 64)
    high = pack_bits((codes >> 4).reshape(2 * n, 4, 32), 2).reshape(n, 64)
    return np.concatenate([low, high, scales.astype(np.int8).view(np.uint8), d], axis=1)


def _iq4_nl(blocks: Floats) -> Bytes:
    first = _extreme(blocks) / IQ4_LEVELS[0]
    levels: Floats = IQ4_LEVELS[nearest(_ratio(blocks, first[:, None]), IQ4_LEVELS)]
    # The levels are uneven: the scale that fits the chosen ones best is not the first one.
    fitted = (blocks * levels).sum(axis=1) / (levels * levels).sum(axis=1)
    d, unit = _half(fitted)
    codes = nearest(_ratio(blocks, unit[:, None]), IQ4_LEVELS)
    return np.concatenate([d, pack_nibbles(codes, 16)], axis=1)


def _iq4_xs(blocks: Floats) -> Bytes:
    n = len(blocks)
    runs = blocks.reshape(n, 8, 32)
    scale = _extreme(runs) / IQ4_LEVELS[0]
    d, unit = _half(np.abs(scale).max(axis=1) / 31)
    scales = _codes(_ratio(scale, unit[:, None]), -32, 31)
    codes = nearest(_ratio(runs, (unit[:, None] * scales)[:, :, None]), IQ4_LEVELS)
    stored = (scales + 32).astype(np.uint16)
    low = (stored & 15).astype(np.uint8)
    high = np.bitwise_or.reduce(stored >> 4 << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    packed = pack_nibbles(codes.reshape(n, 256), 16)
    low_bytes = low[:, ::2] | low[:, 1::2] << 4
    return np.concatenate([d, _bytes_of(high.astype("<u2"), n), low_bytes, packed], axis=1)


def _mxfp4(blocks: Floats) -> Bytes:
    # OCP Microscaling 1.0: the exponent of the largest value, less that of 4, E2M1's largest.
    _, exponent = np.frexp(np.abs(blocks).max(axis=1))
    code = np.where(blocks.any(axis=1), np.clip(exponent + (126 - 2), 0, 254), 0)
    codes = _nearest_fp4(_ratio(blocks, E8M0_HALVES[code][:, None]))
    return np.concatenate([code.astype(np.uint8)[:, None], pack_nibbles(codes, 16)], axis=1)


def _nvfp4(blocks: Floats) -> Bytes:
    n = len(blocks)
    runs = blocks.reshape(n, 4, 16)
    scales = nearest(np.abs(runs).max(axis=2) / FP4_LEVELS[7], UE4M3_HALVES[:0x7F])
    codes = _nearest_fp4(_ratio(runs, UE4M3_HALVES[scales][:, :, None]))
    return np.concatenate([scales.astype(np.uint8), pack_nibbles(codes.reshape(n, 64), 8)], axis=1)


ENCODERS: dict[GGMLType, Callable[[Floats], Bytes]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: lambda blocks: _centred_32(blocks, 15),
    GGMLType.Q4_1: lambda blocks: _ranged_32(blocks, 15),
    GGMLType.Q5_0: lambda blocks: _centred_32(blocks, 31),
    GGMLType.Q5_1: lambda blocks: _ranged_32(blocks, 31),
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
}
