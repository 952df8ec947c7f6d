"""The AMX paths: their real instructions where they run, emulated ones in the avx512 tier."""

import numpy as np
import pytest

from greenroom import native
from greenroom.gguf import GGMLType

from .test_moe import Layer, routes
from .twins import FLOATING, NATIVE, Matrix

QUANTISED = [t for t in NATIVE if t not in FLOATING]


@pytest.fixture(params=[t for t in ("avx512", "amx") if t in native.usable_tiers()])
def lib(request):
    module = native.module(request.param)
    module._use_tiles(True)
    yield module
    module._use_tiles(request.param == "amx")


@pytest.fixture
def pool(lib):
    return lib.Pool(2)


def tokens_of(count: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng([count, cols])
    return rng.standard_normal((count, cols)).astype(np.float32) * 3


def both(lib, run):
    """Results with and without tiles."""
    tiled = run()
    lib._use_tiles(False)
    plain = run()
    lib._use_tiles(True)
    return tiled, plain


def linear(lib, pool, m: Matrix, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), m.rows), np.nan, np.float32)
    lib.linear(pool, int(m.type), m.rows, m.cols, m.packed, x, out)
    return out


@pytest.mark.parametrize("type", QUANTISED, ids=lambda t: t.name)
def test_int8_tiles_give_the_same_bits(lib, pool, type: GGMLType) -> None:
    before = lib._int8_tiles()
    block = type.block_size
    for rows, cols in ((16, block), (40, 512), (100, 5 * max(block, 32) if block < 256 else 768)):
        m = Matrix(lib, pool, type, rows, cols)
        for tokens in (9, 16, 33, 65):
            x = tokens_of(tokens, cols)
            x[tokens // 2] = 0
            x[tokens // 3] *= 1e4
            tiled, plain = both(lib, lambda m=m, x=x: linear(lib, pool, m, x))
            np.testing.assert_array_equal(tiled.view(np.uint32), plain.view(np.uint32))
            expected, bound = m.product(x)
            assert (np.abs(tiled - expected) <= bound).all()
    assert lib._int8_tiles() > before  # else the path was not taken


def test_int8_tiles_at_the_largest_sums(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q8_0, 16, 64)
    m.raw[:] = 0x80  # codes of -128, all of one sign
    lib.pack(pool, int(m.type), 16, 64, m.raw.reshape(-1), m.packed)
    x = np.full((16, 64), 3, np.float32)
    x[::2] = -3
    tiled, plain = both(lib, lambda: linear(lib, pool, m, x))
    np.testing.assert_array_equal(tiled, plain)
    assert (np.abs(tiled) > 0).all()


def test_what_is_not_finite_stays_visible(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_K, 16, 256)
    x = tokens_of(16, 256)
    x[3, 40] = np.inf
    out = linear(lib, pool, m, x)
    assert np.isnan(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


@pytest.mark.parametrize("tokens", [12, 16, 33, 65])
def test_bfloat16_tiles(lib, pool, tokens: int) -> None:
    for rows in (16, 40, 100):
        m = Matrix(lib, pool, GGMLType.BF16, rows, 512)
        x = tokens_of(tokens, 512)
        out, plain = both(lib, lambda m=m, x=x: linear(lib, pool, m, x))
        expected = x.astype(np.float64) @ m.values.T
        size = np.abs(x).astype(np.float64) @ np.abs(m.values).T
        # activations in two parts lose almost nothing
        assert (np.abs(out - expected) <= 2.0**-15 * size).all()
        assert np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)) < 2e-5
        assert (out != plain).any()  # else the path was not taken


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.BF16], ids=lambda t: t.name)
def test_moe(lib, pool, type: GGMLType) -> None:
    layer = Layer(lib, pool, (type, type, GGMLType.Q8_0), kind="gpt-oss", bias=True)
    for tokens in (30, 60):  # experts below and above the fewest tokens for tiles
        batch = routes(tokens, 4, 2, layer.d)
        found, plain = both(lib, lambda batch=batch: layer.run(*batch))
        if type == GGMLType.BF16:
            assert np.linalg.norm(found - plain) < 3e-5 * np.linalg.norm(plain)
        else:
            np.testing.assert_array_equal(found, plain)
        np.testing.assert_array_equal(layer.run(*batch, pool=lib.Pool(1)), found)
