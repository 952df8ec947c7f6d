"""Packing and linear layers: every format, every usable tier, odd shapes, hostile arguments."""

from itertools import pairwise

import numpy as np
import pytest

from greenroom import native
from greenroom.gguf import GGMLType, dequantize

from .twins import FLOATING, NATIVE, Matrix, tiles

REFUSED = "are needed|must lie|not a multiple|no native kernel"
ROWS = (1, 15, 17, 100)
TOKENS = (1, 2, 3, 7, 17, 49, 65)
formats = pytest.mark.parametrize("type", NATIVE, ids=lambda t: t.name)


def widths(type: GGMLType) -> tuple[int, ...]:
    block = type.block_size
    return (7, 32, 200) if block == 1 else (block, 5 * block if block < 256 else 3 * block)


def tokens_of(count: int, cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng([seed, count, cols])
    return rng.standard_normal((count, cols)).astype(np.float32) * 3


def linear(lib, pool, m: Matrix, x: np.ndarray, **options) -> np.ndarray:
    out = np.full((len(x), m.rows), np.nan, np.float32)
    lib.linear(pool, int(m.type), m.rows, m.cols, m.packed, x, out, **options)
    return out


def test_list_of_formats(lib) -> None:
    assert set(lib.native_types()) == {int(t) for t in NATIVE}


@formats
def test_unpack_is_bit_exact(lib, pool, type: GGMLType) -> None:
    for cols in widths(type):
        for rows in ROWS:
            m = Matrix(lib, pool, type, rows, cols)
            out = np.empty((rows, cols), np.float32)
            lib.unpack(int(type), rows, cols, m.packed, out)
            expected = dequantize(type, m.raw).reshape(rows, cols)
            np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type", [t for t in NATIVE if t not in FLOATING], ids=lambda t: t.name)
def test_unpack_of_arbitrary_bytes(lib, pool, type: GGMLType) -> None:
    rng = np.random.default_rng(type)
    rows, cols = 40, 512
    raw = rng.integers(0, 256, (rows, type.row_bytes(cols)), np.uint8)
    packed = np.zeros(lib.packed_bytes(int(type), rows, cols), np.uint8)
    lib.pack(pool, int(type), rows, cols, raw.reshape(-1), packed)
    out = np.empty((rows, cols), np.float32)
    lib.unpack(int(type), rows, cols, packed, out)
    with np.errstate(all="ignore"):
        expected = dequantize(type, raw).reshape(rows, cols)
    np.testing.assert_array_equal(out, expected)


@formats
def test_linear(lib, pool, type: GGMLType) -> None:
    for cols in widths(type):
        for rows in ROWS:
            m = Matrix(lib, pool, type, rows, cols)
            for count in TOKENS:
                x = tokens_of(count, cols)
                expected, bound = m.product(x)
                assert (np.abs(linear(lib, pool, m, x) - expected) <= bound).all(), (rows, count)


@formats
def test_a_token_does_not_feel_its_neighbours(lib, pool, type: GGMLType) -> None:
    m = Matrix(lib, pool, type, 33, 512)
    x = tokens_of(65, 512)
    together = linear(lib, pool, m, x)
    for t in (0, 15, 16, 64):
        np.testing.assert_array_equal(together[t], linear(lib, pool, m, x[t : t + 1])[0])
    np.testing.assert_array_equal(together[3:10], linear(lib, pool, m, x[3:10]))
    for count in range(2, 17):  # every way to fill up a tile
        np.testing.assert_array_equal(together[:count], linear(lib, pool, m, x[:count]))


@formats
def test_tiers_agree(type: GGMLType) -> None:
    results = []
    x = tokens_of(21, 768)  # tiles of 16, 4 and 1, of 4 and 1, or of 21
    for tier in native.usable_tiers():
        lib = native.module(tier)
        pool = lib.Pool(1)
        m = Matrix(lib, pool, type, 64, 768)
        with tiles(lib, False):
            results.append((m.packed, linear(lib, pool, m, x)))
    _, bound = m.product(x)
    for packed, out in results[1:]:
        np.testing.assert_array_equal(packed, results[0][0])
        assert (np.abs(out - results[0][1]) <= bound).all()
    if type not in {GGMLType.F32, GGMLType.F16, GGMLType.BF16}:  # the portable tier never fuses
        for _, out in results[2:]:
            np.testing.assert_array_equal(out, results[1][1])


def test_bias_and_scale(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q8_0, 50, 64)
    x = tokens_of(3, 64)
    bias = np.arange(50, dtype=np.float32)
    expected = linear(lib, pool, m, x) * np.float32(0.5) + bias
    np.testing.assert_array_equal(linear(lib, pool, m, x, bias=bias, scale=0.5), expected)


def test_several_matrices_share_one_region(lib, pool) -> None:
    x = tokens_of(9, 256)
    types = (GGMLType.Q4_K, GGMLType.F32, GGMLType.Q8_0)
    matrices = [Matrix(lib, pool, t, r, 256) for t, r in zip(types, (100, 16, 33), strict=True)]
    outs = [np.empty((9, m.rows), np.float32) for m in matrices]
    jobs = [
        (int(m.type), m.rows, m.packed, o, None, 1.0) for m, o in zip(matrices, outs, strict=True)
    ]
    lib.linears(pool, jobs, x)
    for m, out in zip(matrices, outs, strict=True):
        np.testing.assert_array_equal(out, linear(lib, pool, m, x))


def test_more_tokens_than_one_pass(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_0, 20, 64)
    x = tokens_of(1100, 64)
    expected, bound = m.product(x)
    assert (np.abs(linear(lib, pool, m, x) - expected) <= bound).all()


def test_no_tokens(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_0, 20, 64)
    assert linear(lib, pool, m, tokens_of(0, 64)).shape == (0, 20)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(lib, pool, value: float) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_0, 20, 64)
    x = tokens_of(2, 64)
    x[0, 40] = value
    out = linear(lib, pool, m, x)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_zeros_and_extremes(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q5_1, 20, 64)
    x = np.zeros((2, 64), np.float32)
    x[1] = 1e-30
    out = linear(lib, pool, m, x)
    assert (out[0] == 0).all()
    assert np.isfinite(out[1]).all()


def test_hostile_arguments_raise(lib, pool) -> None:
    m = Matrix(lib, pool, GGMLType.Q4_K, 16, 256)
    x, out = tokens_of(2, 256), np.empty((2, 16), np.float32)
    q4_k = int(GGMLType.Q4_K)
    for type, rows, cols in [(99, 16, 256), (q4_k, 16, 255), (q4_k, 0, 256), (q4_k, -1, 256)]:
        with pytest.raises(ValueError, match=REFUSED):
            lib.packed_bytes(type, rows, cols)
    with pytest.raises(ValueError, match=REFUSED):
        lib.packed_bytes(q4_k, 2**40, 256)
    calls = [
        (q4_k, 16, 256, m.packed[:-1], x, out),
        (q4_k, 17, 256, m.packed, x, out),
        (q4_k, 16, 256, m.packed, x[:, :128].copy(), out),
        (q4_k, 16, 256, m.packed, x, out[:1]),
        (q4_k, 16, 512, m.packed, x, out),
    ]
    for type, rows, cols, packed, given, to in calls:
        with pytest.raises(ValueError, match=REFUSED):
            lib.linear(pool, type, rows, cols, packed, given, to)
    wrong = [
        (m.packed.view(np.int8), x, out),
        (m.packed, x.astype(np.float64), out),
        (m.packed, x.T, out),
        (m.packed, None, out),
    ]
    for packed, given, to in wrong:
        with pytest.raises(TypeError):
            lib.linear(pool, q4_k, 16, 256, packed, given, to)
    with pytest.raises(ValueError, match=REFUSED):
        lib.linear(pool, q4_k, 16, 256, m.packed, x, out, bias=np.zeros(15, np.float32))
    with pytest.raises(ValueError, match=REFUSED):
        lib.pack(pool, q4_k, 16, 256, m.raw.reshape(-1)[:-1], m.packed)
    with pytest.raises(ValueError, match=REFUSED):
        lib.pack(pool, q4_k, 16, 256, m.raw.reshape(-1), m.packed[:-64])


def test_matrices_packed_together_are_those_packed_alone(lib) -> None:
    """Small and large, of several types, one behind the other in memory that is not empty."""
    pool, rng = lib.Pool(3), np.random.default_rng(1)
    shapes = [(GGMLType.MXFP4, 1500, 2880), (GGMLType.BF16, 19, 37), (GGMLType.Q6_K, 33, 256),
              (GGMLType.Q8_0, 16, 32), (GGMLType.Q4_K, 3000, 1024)]  # fmt: skip
    alone, matrices = [], []
    for type, rows, cols in shapes:
        raw = rng.integers(0, 256, rows * type.row_bytes(cols), np.uint8)
        alone.append(np.full(lib.packed_bytes(int(type), rows, cols), 255, np.uint8))
        lib.pack(lib.Pool(1), int(type), rows, cols, raw, alone[-1])
        matrices.append((int(type), rows, cols, raw))
    ends = np.cumsum([0, *(len(packed) for packed in alone)])
    memory = np.full(ends[-1] + 64, 255, np.uint8)
    parts = [memory[begin:end] for begin, end in pairwise(ends)]
    lib.pack_all(pool, [(*m, part) for m, part in zip(matrices, parts, strict=True)])
    np.testing.assert_array_equal(memory[:-64], np.concatenate(alone))
    assert (memory[-64:] == 255).all()
    lib.pack_all(pool, [])
    with pytest.raises(ValueError, match=REFUSED):
        lib.pack_all(pool, [(*matrices[0], parts[0]), (*matrices[1], parts[1][:-64])])


def test_a_copy_is_the_same(lib, pool) -> None:
    source = np.random.default_rng(2).integers(0, 256, (5 << 20) + 7, np.uint8)
    copy = np.zeros_like(source)
    lib.copy(pool, source, copy)
    np.testing.assert_array_equal(copy, source)
    with pytest.raises(ValueError, match=REFUSED):
        lib.copy(pool, source, copy[:-1])
