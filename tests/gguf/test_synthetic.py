"""Random blocks: magnitudes, reproducibility, validity, speed."""

import sys

import numpy as np
import pytest

from greenroom.errors import UnsupportedModelError
from greenroom.gguf import GGMLType, dequantize, random_blocks
from greenroom.gguf.formats import DECODERS


@pytest.mark.parametrize("type", DECODERS, ids=lambda type: type.name)
@pytest.mark.parametrize("cols", [768, 2816])
def test_mean_and_deviation(type: GGMLType, cols: int) -> None:
    values = dequantize(type, random_blocks(type, 300, cols, np.random.default_rng(type)))
    assert values.shape == (300, cols)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(cols**-0.5, rel=0.03)
    assert abs(values.mean()) < 0.02 * cols**-0.5
    wider = dequantize(type, random_blocks(type, 300, cols, np.random.default_rng(5), 0.5))
    assert wider.std() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("type", DECODERS, ids=lambda type: type.name)
def test_seed_decides_and_blocks_differ(type: GGMLType) -> None:
    first = random_blocks(type, 7, 512, np.random.default_rng(1))
    np.testing.assert_array_equal(first, random_blocks(type, 7, 512, np.random.default_rng(1)))
    assert first.shape == (7, type.row_bytes(512))
    assert (first != random_blocks(type, 7, 512, np.random.default_rng(2))).any(axis=1).all()
    assert (first[0] != first[1]).any()


def test_odd_sizes_and_refusals() -> None:
    rng = np.random.default_rng(0)
    assert random_blocks(GGMLType.Q8_0, 3, 32, rng).shape == (3, 34)
    assert random_blocks(GGMLType.F16, 3, 5, rng).shape == (3, 10)
    with pytest.raises(ValueError, match="block of 256"):
        random_blocks(GGMLType.Q4_K, 1, 128, rng)
    with pytest.raises(UnsupportedModelError, match="IQ2_XS"):
        random_blocks(GGMLType.IQ2_XS, 1, 256, rng)


def test_blocks_are_made_many_at_a_time() -> None:
    """On a core 2,900 MB/s were measured; a call for each block would be far from that."""
    rng = np.random.default_rng(0)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        blocks = random_blocks(GGMLType.MXFP4, 4096, 2880, rng)
    finally:
        sys.setprofile(None)
    assert blocks.nbytes == 4096 * 90 * 17
    assert 0 < calls < 1000
