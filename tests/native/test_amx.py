"""The AMX path: its real instructions where they run, emulated ones in the avx512 tier."""

import numpy as np
import pytest

from greenroom.gguf import GGMLType

from .test_moe import Layer, routes
from .twins import NATIVE, Matrix, as_bytes, tiles

FEWEST = 12
IN_TILES = [t for t in NATIVE if t not in {GGMLType.F32, GGMLType.F16}]

# Short codes times a scale of few bits fit the 8 bits of a bfloat16, or int8.
EXACT = (GGMLType.BF16, GGMLType.MXFP4, GGMLType.NVFP4)


@pytest.fixture
def lib(tiled):
    return tiled


@pytest.fixture
def pool(lib):
    return lib.Pool(2)


def tokens_of(count: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng([count, cols])
    return rng.standard_normal((count, cols)).astype(np.float32) * 3


def both(lib, run):
    """Results with and without tiles."""
    tiled = run()
    with tiles(lib, False):
        return tiled, run()


def linear(lib, pool, m: Matrix, x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    out = np.full((len(x), m.rows), np.nan, np.float32)
    lib.linear(pool, int(m.type), m.rows, m.cols, m.packed, x, out, scale=scale)
    return out


def check(m: Matrix, x: np.ndarray, out: np.ndarray) -> None:
    """Holds a product to what its arithmetic allows.

    A weight in two parts, both cut off, loses 2^-14 at most; an activation in two, both rounded,
    2^-16; the low parts' product, which is left out, has 2^-15; each of up to 3 cols additions
    loses 2^-24 of a sum.

    MXFP4's sums are integers of 512 columns, of exact weights and of tokens as the twin rounds
    them: 2^-24 are lost as a sum becomes a float32, with its scale and when it is added.
    """
    in_bytes = m.type == GGMLType.MXFP4
    expected = (as_bytes(x) if in_bytes else x.astype(np.float64)) @ m.values.T
    size = np.abs(x).astype(np.float64) @ np.abs(m.values).T
    if in_bytes:
        rounding = (3 + -(-m.cols // 512)) * 2.0**-24
    else:
        parts = 2.0**-16 + (0 if m.type in EXACT else 2.0**-14 + 2.0**-15)
        rounding = parts + 3 * m.cols * 2.0**-24
    assert (np.abs(out - expected) <= rounding * size).all()
    usual = x.std(axis=1) < 10
    error, total = out[usual] - expected[usual], expected[usual]
    limit = 5e-6 if m.type in EXACT else 2e-5
    assert np.sqrt(np.mean(error**2) / np.mean(total**2)) < limit


@pytest.mark.parametrize("type", IN_TILES, ids=lambda t: t.name)
def test_products(lib, pool, type: GGMLType) -> None:
    block = type.block_size
    # one block; a group left over of three; more blocks than are expanded at once
    for rows, cols in ((16, max(block, 32)), (40, 512), (100, 9 * block if block > 1 else 300)):
        m = Matrix(lib, pool, type, rows, cols)
        for tokens in (FEWEST, 16, 33, 65):
            x = tokens_of(tokens, cols)
            x[tokens // 2] = 0
            x[tokens // 3] *= 1e4
            tiled, plain = both(lib, lambda m=m, x=x: linear(lib, pool, m, x))
            check(m, x, tiled)
            assert (tiled[tokens // 2] == 0).all()
            assert (tiled != plain).any()  # else the path was not taken


@pytest.mark.parametrize("type", IN_TILES, ids=lambda t: t.name)
def test_a_token_does_not_feel_its_neighbours(lib, pool, type: GGMLType) -> None:
    m = Matrix(lib, pool, type, 72, 768)
    x = tokens_of(300, 768)
    together = linear(lib, pool, m, x)
    for begin, end in ((0, 16), (5, 38), (250, 300)):
        np.testing.assert_array_equal(linear(lib, pool, m, x[begin:end]), together[begin:end])
    np.testing.assert_array_equal(linear(lib, pool, m, x[:130]), together[:130])


@pytest.mark.parametrize("type", [GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.BF16])
def test_few_tokens_go_without(lib, pool, type: GGMLType) -> None:
    m = Matrix(lib, pool, type, 48, 256)
    x = tokens_of(FEWEST - 1, 256)
    tiled, plain = both(lib, lambda: linear(lib, pool, m, x))
    np.testing.assert_array_equal(tiled, plain)


def test_largest_codes(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q8_0, 16, 64)
    m.raw[:] = 0x80  # codes of -128, all of one sign
    m.pack(lib, pool)
    x = np.full((16, 64), 3, np.float32)
    x[::2] = -3
    tiled, plain = both(lib, lambda: linear(lib, pool, m, x))
    np.testing.assert_allclose(tiled, plain, rtol=2.0**-14)
    assert (np.abs(tiled) > 0).all()


def test_codes_at_the_zero_point_are_zero(lib, pool) -> None:
    for type in (GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.MXFP4):
        m = Matrix(lib, pool, type, 16, 256)
        where = m.values == 0
        assert where.any()
        x = np.eye(256, dtype=np.float32)
        assert (linear(lib, pool, m, x).T[where] == 0).all()


def test_powers_at_the_ends_of_their_range(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.MXFP4, 48, 128)
    powers = m.raw.reshape(48, 4, 17)[:, :, 0]
    powers[:16] = 120
    powers[3, 1], powers[7, 2] = 252, 2
    powers[16:] = 0, 1, 120, 200
    m.pack(lib, pool)
    x = tokens_of(20, m.cols) * np.float32(2.0**-24)
    check(m, x, linear(lib, pool, m, x))


def test_scale(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.NVFP4, 40, 128)
    x = tokens_of(20, 128)
    whole = linear(lib, pool, m, x)
    np.testing.assert_array_equal(linear(lib, pool, m, x, scale=0.5), whole / 2)


@pytest.mark.parametrize("value", [np.inf, np.nan, np.uint32(0x7FFFFFFF).view(np.float32)])
def test_what_is_not_finite_stays_visible(lib, pool, value: float) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_K, 16, 256)
    x = tokens_of(16, 256)
    x[3, 40] = value
    out = linear(lib, pool, m, x)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


@pytest.mark.parametrize("gate", [GGMLType.MXFP4, GGMLType.Q4_K, GGMLType.BF16],
                         ids=lambda t: t.name)  # fmt: skip
@pytest.mark.parametrize("up", [None, GGMLType.F16], ids=["same", "F16"])  # no tiles for F16
def test_moe(lib, pool, gate: GGMLType, up: GGMLType | None) -> None:
    layer = Layer(lib, pool, (gate, up or gate, GGMLType.Q8_0), kind="gpt-oss", bias=True)
    # Without tiles a token's step is 1/32512 of the largest of 32 columns, 2.2 deviations, and h's
    # a little more; bfloat16 has hardly any, bytes one of the largest of 256, 3 deviations.
    # Both of gate and up: (2 (2.2^2 + 3^2) + 3^2)^.5 / 32512 / 12^.5 = 5.4e-5.
    limit = 5.4e-5 if gate == GGMLType.MXFP4 else 4e-5
    for tokens in (30, 60, 300):  # experts around the fewest tokens for tiles; several jobs each
        batch = routes(tokens, 4, 2, layer.d)
        found, plain = both(lib, lambda batch=batch: layer.run(*batch))
        assert np.linalg.norm(found - plain) < limit * np.linalg.norm(plain)
        assert (found != plain).any()
        np.testing.assert_array_equal(layer.run(*batch, pool=lib.Pool(1)), found)
