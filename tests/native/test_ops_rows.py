"""Norms, rotary embedding and cache writes against torch, on every tier."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from greenroom import native


@pytest.fixture(params=native.usable_tiers())
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return native.module(request.param)


@pytest.fixture(params=[1, 3])
def pool(lib: ModuleType, request: pytest.FixtureRequest) -> Any:
    return lib.Pool(request.param)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


WIDTHS = [1, 3, 16, 20, 64, 257, 2880]
TOKENS = [0, 1, 2, 67]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rms_norm(lib: ModuleType, pool: Any, tokens: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(tokens, width) * 3, torch.randn(width)
    out = torch.full_like(x, torch.nan)
    lib.rms_norm(pool, x, weight, 1e-5, out)
    torch.testing.assert_close(out, rms(x, weight, 1e-5), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(lib: ModuleType, pool: Any, width: int, biased: bool) -> None:
    torch.manual_seed(width)
    x, weight, bias = torch.randn(19, width) + 5, torch.randn(width), torch.randn(width)
    out = torch.full_like(x, torch.nan)
    lib.layer_norm(pool, x, weight, bias if biased else None, 1e-5, out)
    expected = torch.nn.functional.layer_norm(
        x.double(), (width,), weight.double(), bias.double() if biased else None, 1e-5
    )
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


def test_norm_adds_the_residual_first(lib: ModuleType, pool: Any) -> None:
    x, residual, weight = torch.randn(70, 300), torch.randn(70, 300), torch.randn(300)
    total = x + residual
    out = torch.empty_like(x)
    lib.rms_norm(pool, x, weight, 1e-6, out, residual)
    assert torch.equal(x, total)
    torch.testing.assert_close(out, rms(total, weight, 1e-6), rtol=2e-6, atol=2e-6)


def test_norm_of_heads_in_a_slice_in_place(lib: ModuleType, pool: Any) -> None:
    fused, weight = torch.randn(9, 4 * 24 + 50), torch.randn(24)
    before = fused.clone()
    heads = fused[:, 10:106].view(9, 4, 24)
    lib.rms_norm(pool, heads, weight, 1e-6, heads)
    expected = rms(before[:, 10:106].reshape(9, 4, 24), weight, 1e-6)
    torch.testing.assert_close(fused[:, 10:106].reshape(9, 4, 24), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(fused[:, :10], before[:, :10])
    assert torch.equal(fused[:, 106:], before[:, 106:])


def test_norm_at_extremes(lib: ModuleType, pool: Any) -> None:
    x = torch.tensor([[0.0] * 40, [1e18] * 40, [1e-30] * 40, [-1e18] * 40])
    out = torch.empty_like(x)
    lib.rms_norm(pool, x, torch.ones(40), 1e-6, out)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[1], torch.ones(40))


def turn(x: Tensor, positions: Tensor, inv_freq: Tensor, magnitude: float, style: str) -> Tensor:
    angle = (positions.double()[:, None] * inv_freq.double()).unsqueeze(1)
    cosine, sine = (angle.cos() * magnitude).float(), (angle.sin() * magnitude).float()
    rotated = x.clone()
    pairs = inv_freq.shape[0]
    first = slice(0, pairs) if style == "neox" else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if style == "neox" else slice(1, 2 * pairs, 2)
    a, b = x[..., first], x[..., second]
    rotated[..., first], rotated[..., second] = a * cosine - b * sine, a * sine + b * cosine
    return rotated


@pytest.mark.parametrize("style", ["neox", "norm"])
@pytest.mark.parametrize(
    ("head_dim", "rotated"), [(64, 64), (128, 128), (80, 20), (6, 6), (48, 32)]
)
def test_rope(lib: ModuleType, pool: Any, style: str, head_dim: int, rotated: int) -> None:
    torch.manual_seed(head_dim)
    positions = torch.randint(0, 131072, (37,))
    inv_freq = 150000 ** (-torch.arange(0, rotated, 2) / rotated)
    table = torch.empty(37, 2, rotated // 2)
    lib.rope_table(pool, positions, inv_freq, 1.3465736, table)
    fused = torch.randn(37, 5 * head_dim + 7)
    x = fused[:, 7:].view(37, 5, head_dim)
    expected = turn(x.clone(), positions, inv_freq, 1.3465736, style)
    lib.rope(pool, x, table, style)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_rope_neox_of_permuted_rows_is_norm(lib: ModuleType, pool: Any) -> None:
    x = torch.randn(11, 3, 32)
    table = torch.empty(11, 2, 16)
    lib.rope_table(pool, torch.arange(11), 10000 ** (-torch.arange(16) / 16), 1.0, table)
    order = torch.arange(32).view(2, 16).T.reshape(-1)  # row 2i + s of norm is s * 16 + i of neox
    adjacent = x[..., order].contiguous()
    lib.rope(pool, adjacent, table, "norm")
    lib.rope(pool, x, table, "neox")
    torch.testing.assert_close(adjacent, x[..., order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("key_width", "value_width"), [(64, 64), (20, 12), (1, 33)])
def test_write_kv(
    lib: ModuleType, pool: Any, dtype: torch.dtype, key_width: int, value_width: int
) -> None:
    torch.manual_seed(1)
    tokens, heads, blocks, size = 41, 3, 7, 8
    k = torch.randn(tokens, heads, key_width) * 100
    v = torch.randn(tokens, heads + 1, value_width)[:, 1:]  # rows with gaps
    slots = torch.randperm(blocks * size)[:tokens]
    k_cache = torch.full((blocks, heads, size, key_width), -7.0, dtype=dtype)
    v_cache = torch.full((blocks, heads, size, value_width), -7.0, dtype=dtype)
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    wanted_k[slots // size, :, slots % size] = k.to(dtype)
    wanted_v[slots // size, :, slots % size] = v.to(dtype)
    lib.write_kv(pool, k, v, slots, k_cache, v_cache)
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(v_cache, wanted_v)


def test_float16_is_rounded_as_ieee_says(lib: ModuleType) -> None:
    """All binades, ties, subnormals, overflow and infinities, one row of length 1 each."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (halves[:-1].double() + halves[1:].double()).div(2).float()
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(0.0)), middle * (1 + 1e-6)])
    extremes = torch.tensor([65504, 65519, 65520, 1e30, float("inf"), 1e-30, 2.0**-25])
    values = torch.cat([halves, near, extremes])
    values = torch.cat([values, -values]).view(-1, 1, 1)
    cache = torch.zeros(values.shape[0], 1, 1, 1, dtype=torch.float16)
    slots = torch.arange(values.shape[0])
    lib.write_kv(lib.Pool(1), values, values, slots, cache, torch.zeros_like(cache))
    assert torch.equal(cache.view(torch.int16).flatten(), values.half().view(torch.int16).flatten())


def refused(lib: ModuleType, match: str, name: str, *arguments: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(lib, name)(lib.Pool(1), *arguments)


def test_wrong_arguments_are_refused(lib: ModuleType) -> None:
    x, w = torch.randn(4, 8), torch.ones(8)
    refused(lib, "weight", "rms_norm", x, torch.ones(7), 1e-5, x)
    refused(lib, "weight.*float32", "rms_norm", x, w.double(), 1e-5, x)
    refused(lib, "out", "rms_norm", x, w, 1e-5, torch.empty(3, 8))
    refused(lib, "residual", "rms_norm", x, w, 1e-5, x, torch.empty(5, 8))
    refused(lib, "x: must be contiguous", "rms_norm", x.T, torch.ones(4), 1e-5, x.T)
    refused(lib, "x: expected 2 or 3", "rms_norm", w, w, 1e-5, w)
    refused(lib, "bias", "layer_norm", x, w, torch.ones(9), 1e-5, x)
    refused(lib, "incompatible", "rms_norm", [1.0], w, 1e-5, x)
    positions, table = torch.arange(4), torch.zeros(4, 2, 2)
    refused(lib, "positions.*int64", "rope_table", positions.int(), torch.ones(2), 1.0, table)
    refused(lib, "out", "rope_table", positions, torch.ones(3), 1.0, table)
    heads = torch.randn(4, 2, 4)
    refused(lib, "table", "rope", heads, torch.zeros(4, 2, 3), "neox")
    refused(lib, "table", "rope", heads, torch.zeros(3, 2, 2), "neox")
    refused(lib, "style", "rope", heads, table, "other")


@pytest.mark.parametrize("slot", [-1, 24, 2**40, -(2**62)])
def test_slots_outside_the_cache_are_refused(lib: ModuleType, slot: int) -> None:
    k = torch.randn(2, 2, 4)
    cache = torch.zeros(3, 2, 8, 4)
    slots = torch.tensor([0, slot])
    refused(lib, "slots: entry 1", "write_kv", k, k, slots, cache, cache.clone())
    assert not cache.any()


def test_caches_that_do_not_fit_are_refused(lib: ModuleType) -> None:
    k, slots, cache = torch.randn(2, 2, 4), torch.arange(2), torch.zeros(3, 2, 8, 4)
    refused(lib, "k: does not fit", "write_kv", torch.randn(2, 3, 4), k, slots, cache, cache)
    refused(lib, "v: does not fit", "write_kv", k, torch.randn(2, 2, 5), slots, cache, cache)
    refused(lib, "v: number", "write_kv", k, torch.randn(1, 2, 4), slots, cache, cache)
    refused(lib, "slots", "write_kv", k, k, torch.arange(3), cache, cache)
    refused(lib, "k_cache", "write_kv", k, k, slots, cache.double(), cache)
    refused(lib, "k_cache: must be contig", "write_kv", k, k, slots, cache.transpose(0, 2), cache)
    # the second cache is the smaller one: slot 20 exists only in the first
    refused(lib, "slots", "write_kv", k, k, torch.tensor([0, 20]), cache, cache[:2].clone())


def test_numpy_arrays_are_taken_and_read_only_ones_are_not_written(lib: ModuleType) -> None:
    x, w = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32), np.ones(8, "f4")
    out = np.empty_like(x)
    lib.rms_norm(lib.Pool(1), x, w, 1e-5, out)
    np.testing.assert_allclose(out, rms(torch.tensor(x), torch.ones(8), 1e-5), rtol=1e-5)
    out.setflags(write=False)
    refused(lib, "incompatible", "rms_norm", x, w, 1e-5, out)
