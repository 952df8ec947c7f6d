"""The NumPy reference against `gguf.quants`, bit by bit."""

import gguf
import numpy as np
import pytest

from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType, dequantize, repack_pairs
from greenroom.gguf.formats import DECODERS

OWN = [type for type in DECODERS if type != GGMLType.MXFP4_PAIRS]
PEERS = [
    GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S, GGMLType.IQ3_XXS, GGMLType.IQ3_S,
    GGMLType.IQ1_S, GGMLType.IQ1_M, GGMLType.TQ1_0, GGMLType.TQ2_0,
]  # fmt: skip


def expected(type: GGMLType, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type))


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    # A NaN's sign and payload are the processor's choice; everything else is ours.
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("type", OWN, ids=lambda type: type.name)
def test_random_bytes_decode_as_in_gguf(type: GGMLType) -> None:
    rng = np.random.default_rng(type)
    # Every byte is random: scales take all exponents, infinities and NaNs among them.
    raw = rng.integers(0, 256, (300, 3 * type.block_bytes), np.uint8)
    assert_same_bits(dequantize(type, raw), expected(type, raw))


@pytest.mark.parametrize("type", OWN, ids=lambda type: type.name)
def test_every_byte_value_at_every_place(type: GGMLType) -> None:
    rng = np.random.default_rng(type + 100)
    blocks = np.repeat(rng.integers(0, 256, (1, type.block_bytes), np.uint8), 256, axis=0)
    for place in range(type.block_bytes):
        raw = blocks.copy()
        raw[:, place] = np.arange(256)
        assert_same_bits(dequantize(type, raw), expected(type, raw))


@pytest.mark.parametrize("type", PEERS, ids=lambda type: type.name)
def test_other_types_go_through_gguf(type: GGMLType) -> None:
    raw = np.random.default_rng(type).integers(0, 256, (5, 2 * type.block_bytes), np.uint8)
    assert_same_bits(dequantize(type, raw), expected(type, raw))


def test_shapes_and_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (3, 5, 4 * 144), np.uint8)
    raw.flags.writeable = False
    whole = dequantize(GGMLType.Q4_K, raw)
    assert whole.shape == (3, 5, 1024)
    monkeypatch.setattr("greenroom.gguf.formats.PORTION", 700)
    assert_same_bits(dequantize(GGMLType.Q4_K, raw), whole)
    assert_same_bits(dequantize(GGMLType.Q4_K, raw[1, ::2]), whole[1, ::2])
    assert dequantize(GGMLType.Q4_K, raw[:0]).shape == (0, 5, 1024)


def test_wrong_rows_and_undecodable_types_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 144"):
        dequantize(GGMLType.Q4_K, np.zeros(145, np.uint8))
    with pytest.raises(UnsupportedModelError, match="Q2_0"):
        dequantize(GGMLType.Q2_0, np.zeros((1, 18), np.uint8))


def test_mxfp4_values_from_the_specification() -> None:
    block = np.zeros((1, 17), np.uint8)
    block[0, 0], block[0, 1] = 128, 0x21
    values = dequantize(GGMLType.MXFP4, block)[0]
    assert (values[0], values[16]) == (1.0, 2.0)
    assert not values[1:16].any()


def test_pairs_hold_neighbours() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 16, (7, 32), np.uint8)
    scale = rng.integers(100, 140, (7, 1), np.uint8)
    pairs = np.concatenate([scale, codes[:, ::2] | codes[:, 1::2] << 4], axis=1)
    halves = np.concatenate([scale, codes[:, :16] | codes[:, 16:] << 4], axis=1)
    np.testing.assert_array_equal(repack_pairs(pairs), halves)
    np.testing.assert_array_equal(repack_pairs(pairs.reshape(-1)), halves.reshape(-1))
    assert_same_bits(dequantize(GGMLType.MXFP4_PAIRS, pairs), dequantize(GGMLType.MXFP4, halves))
