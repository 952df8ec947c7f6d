"""The AMX path: its real instructions where they run, emulated ones in the avx512 tier."""

import numpy as np
import pytest

from greenroom import native
from greenroom.gguf import GGMLType

from .test_moe import Layer, routes
from .twins import FLOATING, NATIVE, Matrix

TILED = [t for t in NATIVE if t not in (GGMLType.F32, GGMLType.F16)]
BF16_STEP = 2.0**-8  # of a product of two values, each rounded by half a step of 2^-8


@pytest.fixture(params=[t for t in ("avx512", "amx") if t in native.usable_tiers()])
def lib(request):
    module = native.module(request.param)
    module._use_tiles(True)
    yield module
    module._use_tiles(request.param == "amx")


@pytest.fixture
def pool(lib):
    return lib.Pool(2)


@pytest.mark.parametrize("type", TILED, ids=lambda t: t.name)
@pytest.mark.parametrize("tokens", [12, 16, 33, 65])
def test_linear(lib, pool, type: GGMLType, tokens: int) -> None:
    for rows in (16, 40, 100):
        m = Matrix(lib, pool, type, rows, 512)
        x = np.random.default_rng(tokens).standard_normal((tokens, 512)).astype(np.float32)
        out = np.full((tokens, rows), np.nan, np.float32)
        lib.linear(pool, int(type), rows, 512, m.packed, x, out)
        expected = x.astype(np.float64) @ m.values.T
        size = np.abs(x).astype(np.float64) @ np.abs(m.values).T
        # bfloat16 weights with activations in two parts lose almost nothing
        step = 2.0**-15 if type in FLOATING else BF16_STEP
        assert (np.abs(out - expected) <= step * size).all()
        error = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
        assert error < (2e-5 if type in FLOATING else 4e-3)
        if type not in FLOATING:  # else the path was not taken
            assert error > 1e-4


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.BF16], ids=lambda t: t.name)
def test_moe(lib, pool, type: GGMLType) -> None:
    layer = Layer(lib, pool, (type, type, GGMLType.Q8_0), kind="gpt-oss", bias=True)
    for tokens in (30, 60):  # experts below and above the fewest tokens for tiles
        batch = routes(tokens, 4, 2, layer.d)
        found = layer.run(*batch)
        lib._use_tiles(False)
        plain = layer.run(*batch)
        lib._use_tiles(True)
        assert np.linalg.norm(found - plain) < 1e-2 * np.linalg.norm(plain)
        assert (found != plain).any()
        np.testing.assert_array_equal(layer.run(*batch, pool=lib.Pool(1)), found)
