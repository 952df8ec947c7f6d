"""MXFP4 in AMX tiles of int8: any exponents and shapes, the rounding of tokens, experts."""

import numpy as np
import pytest

from greenroom.gguf import GGMLType

from .test_amx import check, linear, tokens_of
from .test_moe import Layer, close, routes
from .twins import Matrix, as_bytes, quantised

MXFP4 = GGMLType.MXFP4


@pytest.fixture
def lib(tiled):
    return tiled


@pytest.fixture
def pool(lib):
    return lib.Pool(2)


def with_powers(lib, pool, rows: int, powers: np.ndarray) -> Matrix:
    """powers: exponents that broadcast to (rows, blocks); blocks are not all zeros."""
    m = Matrix(lib, pool, MXFP4, rows, 32 * powers.shape[-1])
    blocks = m.raw.reshape(rows, -1, 17)
    blocks[:, :, 0] = powers
    m.pack(lib, pool)
    return m


def check_each_weight(lib, pool, m: Matrix) -> None:
    """Tokens of a single one, which is 32512 times a scale rounded once: the weights come back."""
    x = np.eye(m.cols, dtype=np.float32)
    found = linear(lib, pool, m, x).T
    np.testing.assert_allclose(found, m.values, rtol=2.0**-22, atol=2.0**-124)


@pytest.mark.parametrize("apart", [1, 3, 4, 5, 8, 31, 32, 40, 100])
def test_exponents_apart(lib, pool, apart: int) -> None:
    rng = np.random.default_rng(apart)
    # Two, then several exponents in every row; few rows that need it among others.
    two = 120 - apart * rng.integers(0, 2, (24, 17))
    check_each_weight(lib, pool, with_powers(lib, pool, 24, two))
    several = 200 - apart * rng.integers(0, max(2, 190 // apart), (24, 17))
    check_each_weight(lib, pool, with_powers(lib, pool, 24, np.maximum(several, 2)))
    few = np.full((80, 34), 120)
    few[5, 3], few[37, 20], few[79, 33] = 120 + apart, 120 - apart, 120 - apart
    check_each_weight(lib, pool, with_powers(lib, pool, 80, few))


def test_every_exponent(lib, pool) -> None:
    m = with_powers(lib, pool, 32, np.arange(2, 246).reshape(4, 61).repeat(8, 0))
    x = np.eye(m.cols, dtype=np.float32)
    found = linear(lib, pool, m, x).T
    # The last of the smallest weights' bits are subnormal in one machine word or another.
    np.testing.assert_allclose(found, m.values, rtol=2.0**-22, atol=2.0**-140)
    random = np.random.default_rng(0).integers(2, 248, (48, 33))
    check_each_weight(lib, pool, with_powers(lib, pool, 48, random))


@pytest.mark.parametrize("exponent", [0, 1, 2, 119, 128, 247, 255])
def test_zero_blocks_of_any_exponent(lib, pool, exponent: int) -> None:
    m = Matrix(lib, pool, MXFP4, 40, 544)
    blocks = m.raw.reshape(40, 17, 17)
    zeros = np.random.default_rng(1).random((40, 17)) < 0.4
    zeros[7], zeros[16:32, 16] = True, True
    blocks[zeros] = [exponent] + [0] * 16
    m.pack(lib, pool)
    check_each_weight(lib, pool, m)
    x = tokens_of(20, 544)
    out = linear(lib, pool, m, x)
    check(m, x, out)
    assert (out[:, 7] == 0).all()


@pytest.mark.parametrize("cols", [32, 64, 96, 480, 512, 544, 1056, 2880])
def test_shapes(lib, pool, cols: int) -> None:
    for rows, tokens in ((16, 12), (17, 31), (64, 16), (72, 140), (130, 12)):
        m = Matrix(lib, pool, MXFP4, rows, cols)
        x = tokens_of(tokens, cols)
        x[3, cols // 2] = 300  # an outlier
        x[5] = 0
        x[7] *= np.float32(1e-20)
        out = linear(lib, pool, m, x)
        check(m, x, out)
        assert (out[5] == 0).all()


def test_largest_sums(lib, pool) -> None:
    m = Matrix(lib, pool, MXFP4, 32, 1024)
    blocks = m.raw.reshape(32, 32, 17)
    blocks[:, :, 0] = 120
    blocks[:16, :, 1:], blocks[16:, :, 1:] = 0x77, 0xFF  # 6, -6
    m.pack(lib, pool)
    x = np.full((16, 1024), 5, np.float32)
    x[::2] = -5
    out = linear(lib, pool, m, x)
    np.testing.assert_allclose(out, x.astype(np.float64) @ m.values.T, rtol=2.0**-22)


@pytest.mark.parametrize("outlier", [0, 30])
def test_rounding_of_tokens(lib, pool, outlier: float) -> None:
    """Held to float64, not to a twin.

    A value is at most half a step of its range from what is computed with, peak / 32512, and
    32512 2^-22 of a step, 0.008, as codes and scale are float32. Half steps are as likely as none:
    their variance is a step's square / 12, and a product's the sum of these times the squares of
    its weights. What is added in float32 has 9 roundings at most (`check()`).
    """
    m = Matrix(lib, pool, MXFP4, 96, 2880)
    x = tokens_of(64, 2880)
    x[:, 700] *= max(outlier, 1)
    error = linear(lib, pool, m, x) - x.astype(np.float64) @ m.values.T
    begins = np.arange(0, 2880, 512)
    step = np.maximum.reduceat(np.abs(x).astype(np.float64), begins, axis=1) / 32512
    weights = np.abs(m.values)
    size = np.abs(x) @ weights.T
    most = 0.508 * step @ np.add.reduceat(weights, begins, axis=1).T + 9 * 2.0**-24 * size
    assert (np.abs(error) <= most).all()
    variance = step**2 / 12 @ np.add.reduceat(weights**2, begins, axis=1).T
    assert np.sqrt(np.mean(error**2)) < 1.1 * np.sqrt(np.mean(variance))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_visible(lib, pool, value: float) -> None:
    m = Matrix(lib, pool, MXFP4, 24, 1056)
    m.raw.reshape(24, 33, 17)[4, 16:32] = 0  # nothing to multiply with
    m.pack(lib, pool)
    for col in (0, 700, 1055):
        x = tokens_of(20, 1056)
        x[3, col] = value
        out = linear(lib, pool, m, x)
        assert np.isnan(out[3]).all()
        assert np.isfinite(np.delete(out, 3, axis=0)).all()


def in_tiles(type: GGMLType, x: np.ndarray) -> np.ndarray:
    """What 12 tokens or more of an expert are computed with; bfloat16 parts nearly keep them."""
    return as_bytes(x) if type == MXFP4 else x.astype(np.float64)


@pytest.mark.parametrize("types", [
    (MXFP4,) * 3,
    (MXFP4, MXFP4, GGMLType.Q8_0),
    (MXFP4, GGMLType.F16, MXFP4),
    (GGMLType.Q8_0, GGMLType.Q8_0, MXFP4),
], ids=lambda types: "-".join(t.name for t in types))  # fmt: skip
def test_experts(lib, pool, types) -> None:
    d, f = 544, 1120  # chunks of hidden rows end within ranges
    layer = Layer(lib, pool, types, experts=3, d=d, f=f, kind="gpt-oss", bias=True)
    x, ids, weights = routes(140, 3, 1, d)
    ids[:] = np.arange(140).reshape(-1, 1) % 3 // 2  # 94 and 46 tokens, of the third expert none
    x[3, 17] = 40
    found = layer.run(x, ids, weights)
    close(found[:12], layer.twin(x[:12], ids[:12], weights[:12], in_tiles), False)
    for threads in (1, 3, 7):
        other = lib.Pool(threads)
        for _ in range(3):
            np.testing.assert_array_equal(layer.run(x, ids, weights, pool=other), found)


def test_experts_of_several_types_in_a_layer(lib, pool) -> None:
    layer = Layer(lib, pool, (MXFP4,) * 3, experts=3, d=96, f=544)
    for e, types in enumerate([(GGMLType.Q8_0, MXFP4, GGMLType.F16), (GGMLType.BF16,) * 3]):
        matrices = Layer(lib, pool, types, experts=1, d=96, f=544).experts[0]
        layer.experts[e] = matrices
        layer.native.set_expert(e, *[(int(m.type), m.packed, None, 1.0) for m in matrices[0]])
    batch = routes(60, 3, 2, 96)  # some 40 tokens each
    found = layer.run(*batch)
    close(found, layer.twin(*batch, in_tiles), False)
    for threads in (1, 3):
        np.testing.assert_array_equal(layer.run(*batch, pool=lib.Pool(threads)), found)


def test_experts_around_the_fewest_tokens(lib, pool) -> None:
    layer = Layer(lib, pool, (MXFP4,) * 3, experts=3, d=96, f=544)
    x, ids, weights = routes(23, 3, 1, 96)
    ids[:11], ids[11:] = 0, 2  # 11, without tiles, and 12
    found = layer.run(x, ids, weights)
    seen = (lambda _, x: quantised(x)), in_tiles
    close(found[:11], layer.twin(x[:11], ids[:11], weights[:11], seen[0]), False)
    close(found[11:], layer.twin(x[11:], ids[11:], weights[11:], seen[1]), False)
    x[13, 5] = np.nan
    spoiled = layer.run(x, ids, weights)
    assert np.isnan(spoiled[13]).all()
    np.testing.assert_array_equal(np.delete(spoiled, 13, 0), np.delete(found, 13, 0))
