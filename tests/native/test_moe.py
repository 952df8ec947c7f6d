"""The fused expert MLP: formats, tiers, biases, absent routes, determinism, hostile arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom import native
from greenroom.gguf import GGMLType

from .twins import FLOATING, NATIVE, Matrix, activation, seen_by, tiles

REFUSED = "are needed|must lie|no routes|no expert|activation is"
QUANTISED = [t for t in NATIVE if t not in FLOATING]


class Layer:
    """A layer of random experts in one tier, and its twin in float64."""

    def __init__(self, lib, pool, types, experts=4, d=256, f=256, kind="silu", bias=False) -> None:
        self.lib, self.pool, self.kind, self.d = lib, pool, kind, d
        self.native = lib.MoeLayer(experts, d, f, kind)
        self.experts = []
        rng = np.random.default_rng(3)
        for e in range(experts):
            shapes = zip(types, (f, f, d), (d, d, f), strict=True)
            matrices = [
                Matrix(lib, pool, t, rows, cols, 3 * e + i)
                for i, (t, rows, cols) in enumerate(shapes)
            ]
            biases = [rng.standard_normal(m.rows).astype(np.float32) if bias else None
                      for m in matrices]  # fmt: skip
            scales = [1.0, 0.5, 2.0] if bias else [1.0] * 3
            self.native.set_expert(e, *[
                (int(m.type), m.packed, b, s)
                for m, b, s in zip(matrices, biases, scales, strict=True)
            ])  # fmt: skip
            self.experts.append((matrices, biases, scales))

    def run(self, x, ids, weights, pool=None) -> np.ndarray:
        out = np.full_like(x, np.nan)
        self.lib.moe(pool or self.pool, self.native, x, ids, weights, out)
        return out

    def expert(self, e: int, x: np.ndarray, seen_by=seen_by) -> np.ndarray:
        (gate, up, down), biases, scales = self.experts[e]
        b = [0 if bias is None else bias.astype(np.float64) for bias in biases]
        g = seen_by(gate.type, x) @ gate.values.T * scales[0] + b[0]
        u = seen_by(up.type, x) @ up.values.T * scales[1] + b[1]
        h = activation(self.kind, g, u).astype(np.float32)
        return seen_by(down.type, h) @ down.values.T * scales[2] + b[2]

    def twin(self, x, ids, weights, seen_by=seen_by) -> np.ndarray:
        out = np.zeros(x.shape)
        for t, j in np.ndindex(*ids.shape):
            if ids[t, j] >= 0:
                out[t] += weights[t, j] * self.expert(int(ids[t, j]), x[t : t + 1], seen_by)[0]
        return out


def routes(tokens: int, experts: int, k: int, d: int, seed: int = 0):
    rng = np.random.default_rng([seed, tokens])
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)
    return x, ids.reshape(tokens, k), weights


def close(found: np.ndarray, expected: np.ndarray, exact: bool) -> None:
    # Where h falls on the border between two codes the twin may round the other way: one step of
    # one value, 1/32512 of its block's peak, times one weight.
    limit = 1e-5 if exact else 4e-5
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max() + 1e-6
    if not exact:
        rms = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
        assert rms < 1 / 32512  # a step


@pytest.mark.parametrize("type", NATIVE, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["silu", "gpt-oss"])
def test_moe(lib, pool, type: GGMLType, kind: str) -> None:
    layer = Layer(lib, pool, (type, type, type), kind=kind, bias=kind == "gpt-oss")
    for tokens in (1, 2, 7, 40):
        batch = routes(tokens, 4, 2, layer.d)
        close(layer.run(*batch), layer.twin(*batch), type in FLOATING)


@pytest.mark.parametrize("down", [GGMLType.F32, GGMLType.Q8_0], ids=lambda t: t.name)
def test_types_may_differ(lib, pool, down: GGMLType) -> None:
    layer = Layer(lib, pool, (GGMLType.Q4_K, GGMLType.F16, down), f=96)
    batch = routes(5, 4, 3, layer.d)
    close(layer.run(*batch), layer.twin(*batch), False)


def test_odd_widths(lib, pool) -> None:
    layer = Layer(lib, pool, (GGMLType.BF16,) * 3, d=37, f=45)
    batch = routes(6, 4, 2, 37)
    close(layer.run(*batch), layer.twin(*batch), True)


def test_absent_routes(lib, pool) -> None:
    layer = Layer(lib, pool, (GGMLType.Q8_0,) * 3)
    layer.native.clear_expert(2)
    x, ids, weights = routes(8, 4, 2, layer.d)
    ids[ids == 2] = -1
    ids[5] = -1
    out = layer.run(x, ids, weights)
    close(out, layer.twin(x, ids, weights), False)
    assert (out[5] == 0).all()
    assert (layer.run(x[:1], np.full((1, 2), -1, np.int32), weights[:1]) == 0).all()


def test_one_token_may_name_an_expert_twice(lib, pool) -> None:
    layer = Layer(lib, pool, [GGMLType.Q4_K] * 3)
    x, _, _ = routes(1, 4, 2, 256)
    ids = np.array([[1, 1]], np.int32)
    weights = np.array([[0.25, 0.5]], np.float32)
    once = layer.run(x, ids[:, :1].copy(), np.array([[0.75]], np.float32))
    np.testing.assert_allclose(layer.run(x, ids, weights), once, rtol=1e-4, atol=1e-4)


def test_same_bits_whatever_the_threads(lib, pool) -> None:
    layer = Layer(lib, pool, (GGMLType.Q4_K,) * 3, experts=8)
    pools = [lib.Pool(n) for n in (1, 2, 5)]
    for tokens in (1, 33):
        batch = routes(tokens, 8, 3, layer.d)
        first = layer.run(*batch)
        for other in pools:
            for _ in range(5):
                np.testing.assert_array_equal(layer.run(*batch, pool=other), first)


def test_threads_that_run_out_of_work_help_the_others(lib, pool) -> None:
    """One expert has nearly all tokens, so that most threads' own parts are soon done."""
    layer = Layer(lib, pool, (GGMLType.Q8_0,) * 3, experts=8, d=64, f=96)
    x, ids, weights = routes(200, 8, 2, layer.d)
    ids[ids == 5] = -1
    ids[10:, 0] = 5
    first = layer.run(x, ids, weights)
    np.testing.assert_allclose(first, layer.twin(x, ids, weights), rtol=1e-3, atol=1e-3)
    for threads in (1, 3, 8):
        other = lib.Pool(threads)
        for _ in range(3):
            np.testing.assert_array_equal(layer.run(x, ids, weights, pool=other), first)


def test_a_token_does_not_feel_its_neighbours(lib, pool) -> None:
    layer = Layer(lib, pool, (GGMLType.MXFP4,) * 3)
    x, ids, weights = routes(50, 4, 2, layer.d)
    together = layer.run(x, ids, weights)
    for t in (0, 13, 49):
        one = slice(t, t + 1)
        np.testing.assert_array_equal(layer.run(x[one], ids[one], weights[one]), together[one])


@pytest.mark.parametrize("types", [
    (GGMLType.Q4_1, GGMLType.Q4_1, GGMLType.Q8_0),
    (GGMLType.Q8_0, GGMLType.F16, GGMLType.F32),
    (GGMLType.BF16,) * 3,
], ids=lambda types: "-".join(t.name for t in types))  # fmt: skip
def test_many_narrow_experts(lib, pool, types) -> None:
    """Each token meets most of them, in tiles of all widths and in several jobs an expert."""
    d = 576 if types[0] != GGMLType.BF16 else 549
    layer = Layer(lib, pool, types, experts=12, d=d, f=32)
    x, ids, weights = routes(260, 12, 9, d)
    ids[:, ::4] = -1
    ids[ids == 5] = -1
    ids[:7, 1] = 5
    together = layer.run(x, ids, weights)
    close(together[:30], layer.twin(x[:30], ids[:30], weights[:30]), False)
    for t in (0, 1, 6, 15, 16, 131, 259):
        one = slice(t, t + 1)
        np.testing.assert_array_equal(layer.run(x[one], ids[one], weights[one]), together[one])


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 9),
    data=st.data(),
    type=st.sampled_from(QUANTISED),
)
def test_any_routes(tokens: int, experts: int, data, type: GGMLType) -> None:
    lib = native.lib()
    pool = lib.Pool(2)
    k = data.draw(st.integers(1, experts))
    layer = Layer(lib, pool, (type, type, type), experts=experts)
    x, ids, weights = routes(tokens, experts, k, layer.d, data.draw(st.integers(0, 99)))
    ids[np.random.default_rng(tokens).random(ids.shape) < 0.2] = -1
    with tiles(lib, False):
        close(layer.run(x, ids, weights), layer.twin(x, ids, weights), False)


def test_hostile_arguments_raise(lib, pool) -> None:
    layer = Layer(lib, pool, (GGMLType.Q8_0,) * 3, experts=2)
    x, ids, weights = routes(2, 2, 1, layer.d)
    for bad in (2, -2, 2**30):
        with pytest.raises(ValueError, match="expert id"):
            layer.run(x, np.full((2, 1), bad, np.int32), weights)
    for case in [(x[:, :32].copy(), ids, weights), (x, ids[:1], weights), (x, ids, weights[:1])]:
        with pytest.raises(ValueError, match=REFUSED):
            layer.run(*case)
    with pytest.raises(ValueError, match=REFUSED):
        layer.run(x, np.empty((2, 0), np.int32), np.empty((2, 0), np.float32))
    with pytest.raises(TypeError):
        layer.run(x, ids.astype(np.int64), weights)
    with pytest.raises(TypeError):
        layer.run(x.astype(np.float64), ids, weights)
    layer.native.clear_expert(1)
    with pytest.raises(ValueError, match="not in memory"):
        layer.run(x, np.full((2, 1), 1, np.int32), weights)
    gate = (int(GGMLType.Q8_0), np.zeros(64, np.uint8), None, 1.0)
    with pytest.raises(ValueError, match=REFUSED):
        layer.native.set_expert(0, gate, gate, gate)
    with pytest.raises(ValueError, match=REFUSED):
        layer.native.set_expert(7, gate, gate, gate)
    for arguments in [(0, 32, 32, "silu"), (2, 0, 32, "silu"), (2, 32, 32, "relu")]:
        with pytest.raises(ValueError, match=REFUSED):
            lib.MoeLayer(*arguments)
