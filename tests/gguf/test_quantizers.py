"""Encoders: what is stored decodes to within the format's step, and matches gguf's encoder."""

import gguf
import numpy as np
import pytest

from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType, dequantize, quantize
from greenroom.gguf.formats import bits, k_scales, nibbles
from greenroom.gguf.quantizers import ENCODERS, pack_bits, pack_k_scales, pack_nibbles

# Root mean square error over the deviation of normally distributed numbers. The bounds follow
# from the step: a b-bit grid over a run of n numbers, whose largest is about sqrt(2 ln n)
# deviations, errs by range / 2^b / sqrt(12); the K formats add the steps of their scales.
ERRORS = {
    GGMLType.F32: 0,
    GGMLType.F16: 3e-4,
    GGMLType.BF16: 2e-3,
    GGMLType.Q4_0: 0.09,
    GGMLType.Q4_1: 0.085,
    GGMLType.Q5_0: 0.045,
    GGMLType.Q5_1: 0.041,
    GGMLType.Q8_0: 0.006,
    GGMLType.Q2_K: 0.35,
    GGMLType.Q3_K: 0.17,
    GGMLType.Q4_K: 0.085,
    GGMLType.Q5_K: 0.042,
    GGMLType.Q6_K: 0.02,
    GGMLType.IQ4_NL: 0.082,
    GGMLType.IQ4_XS: 0.085,
    GGMLType.MXFP4: 0.12,
    GGMLType.NVFP4: 0.10,
}


@pytest.mark.parametrize("type", ERRORS, ids=lambda type: type.name)
@pytest.mark.parametrize("deviation", [1.0, 0.02])
def test_error_of_normal_numbers(type: GGMLType, deviation: float) -> None:
    if type == GGMLType.NVFP4:
        deviation *= 16  # its scales end at 2^-9; a side tensor of the model shifts the range
    values = np.random.default_rng(type).normal(0, deviation, (40, 1024)).astype(np.float32)
    error = dequantize(type, quantize(type, values)) - values
    assert np.sqrt((error**2).mean()) <= ERRORS[type] * values.std()


@pytest.mark.parametrize("type", ERRORS, ids=lambda type: type.name)
def test_zeros_constants_and_mixed_magnitudes(type: GGMLType) -> None:
    assert not dequantize(type, quantize(type, np.zeros((2, 512), np.float32))).any()
    values = np.zeros((5, 256), np.float32)
    values[0], values[1, 7], values[2, 30] = 0.75, 1.5, -3.0
    values[3], values[4] = -0.75, np.linspace(-1, 1, 256)
    # The largest number of a block survives within half a step of the coarsest grid.
    decoded = dequantize(type, quantize(type, values))
    assert np.abs(decoded - values).max() <= np.abs(values).max() * 0.17
    rows = np.random.default_rng(1).normal(0, 1, (3, 4, 512)).astype(np.float32)
    rows *= np.array([[1e-3], [1], [1e3], [0]], np.float32)
    decoded = dequantize(type, quantize(type, rows))
    assert decoded.shape == rows.shape
    assert np.isfinite(decoded).all()
    error = np.sqrt(((decoded - rows) ** 2).mean(axis=-1))
    # NVFP4's own scales end at 2^-9: small rows vanish without the tensor's side scale.
    first = 1 if type == GGMLType.NVFP4 else 0
    assert (error[:, first:] <= ERRORS[type] * 1.25 * rows.std(axis=-1)[:, first:] + 1e-7).all()


@pytest.mark.parametrize(
    "name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"]
)
def test_same_bytes_as_gguf(name: str) -> None:
    type = GGMLType[name]
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (800, 256)) * np.exp2(rng.integers(-20, 10, (800, 1)))
    values[0], values[1, 3], values[2] = 0, 2.0**-40, np.repeat([0.25, -3], 128)
    values[3:200] = rng.integers(-127, 128, (197, 256)) / 2  # halves and ties
    values = values.astype(np.float32)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType(type)).view(np.uint8)
    np.testing.assert_array_equal(quantize(type, values), theirs.reshape(800, -1))


@pytest.mark.parametrize("type", ERRORS, ids=lambda type: type.name)
@pytest.mark.filterwarnings("error")
def test_tiny_numbers_become_zero_quietly(type: GGMLType) -> None:
    values = np.zeros((2, 256), np.float32)
    values[:, ::3], values[1, 5] = 1e-44, -3e-39
    assert np.abs(dequantize(type, quantize(type, values))).max() < 1e-38


def test_bf16_keeps_infinities_and_nans() -> None:
    values = np.array([[np.inf, -np.inf, np.nan, 3.4e38, -0.0]], np.float32)
    values = np.append(values, np.array([[0x7F800001]], np.uint32).view(np.float32), axis=1)
    decoded = dequantize(GGMLType.BF16, quantize(GGMLType.BF16, values))[0]
    assert decoded[0] == np.inf
    assert decoded[1] == -np.inf
    assert np.isnan(decoded[[2, 5]]).all()
    assert np.signbit(decoded[4])


def test_packing_inverts_unpacking() -> None:
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (9, 64), np.uint8)
    for run in (4, 8, 16, 32, 64):
        np.testing.assert_array_equal(pack_nibbles(nibbles(raw, run), run), raw)
    for width in (1, 2, 4):
        np.testing.assert_array_equal(pack_bits(bits(raw, width), width), raw)
    np.testing.assert_array_equal(pack_k_scales(*k_scales(raw[:, :12])), raw[:, :12])


@pytest.mark.parametrize("type", ENCODERS, ids=lambda type: type.name)
def test_encoding_what_was_decoded_changes_little(type: GGMLType) -> None:
    values = np.random.default_rng(4).normal(0, 1, (8, 512)).astype(np.float32)
    once = dequantize(type, quantize(type, values))
    twice = dequantize(type, quantize(type, once))
    assert np.sqrt(((twice - once) ** 2).mean()) <= ERRORS[type] * values.std()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiples of 256"):
        quantize(GGMLType.Q4_K, np.zeros((2, 32), np.float32))
    for bad in (np.inf, np.nan):
        with pytest.raises(ValueError, match="Q6_K"):
            quantize(GGMLType.Q6_K, np.full((1, 256), bad, np.float32))
    with pytest.raises(UnsupportedModelError, match="IQ1_S can be read but not written"):
        quantize(GGMLType.IQ1_S, np.zeros((1, 256), np.float32))
