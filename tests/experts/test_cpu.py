"""CPU experts: stacks, lists and fused tensors, lazy packing, foreign types, submit and wait."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.errors import NativeError
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.slabs import Packer, SlabLayout, SplitMatrices, allocate
from greenroom.gguf import GGMLType, dequantize, quantize, random_blocks, repack_pairs

D, F, EXPERTS = 64, 96, 5


def stack(name: str, type: GGMLType, rows: int, cols: int, seed: int) -> SplitMatrices:
    rng = np.random.default_rng(seed)
    raw = np.stack([random_blocks(type, rows, cols, rng) for _ in range(EXPERTS)])
    return SplitMatrices(name, type, raw)


def matrices(gate=GGMLType.Q8_0, up=GGMLType.Q4_0, down=GGMLType.F32):
    return (
        stack("blk.0.ffn_gate_exps.weight", gate, F, D, 1),
        stack("blk.0.ffn_up_exps.weight", up, F, D, 2),
        stack("blk.0.ffn_down_exps.weight", down, D, F, 3),
    )


def routes(tokens: int = 6, k: int = 2):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, D, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    return hidden, ids.int(), torch.rand(tokens, k, generator=generator)


def twin(parts, hidden, ids, weights, biases=None) -> torch.Tensor:
    gate, up, down = (
        torch.from_numpy(np.array(dequantize(m.type, np.stack(list(m.raw))))) for m in parts
    )
    out = torch.zeros_like(hidden)
    for t, j in np.ndindex(*ids.shape):
        e = int(ids[t, j])
        bias = [0.0, 0.0, 0.0] if biases is None else [b[e] for b in biases]
        inner = torch.nn.functional.silu(gate[e] @ hidden[t] + bias[0]) * (
            up[e] @ hidden[t] + bias[1]
        )
        out[t] += weights[t, j] * (down[e] @ inner + bias[2])
    return out


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    # int8 activations: 1/254 of a block's peak per value, averaged over the columns.
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("lazy", [False, True])
def test_experts_with_biases(pool, lazy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    biases = tuple(torch.randn(EXPERTS, n, generator=generator) for n in (F, F, D))
    parts = matrices()
    experts = CpuExperts(pool, parts, biases, lazy=lazy)
    near(experts(*routes()), twin(parts, *routes(), biases))


def test_lists_and_stacks_are_the_same(pool) -> None:
    parts = matrices()
    lists = tuple(SplitMatrices(m.name, m.type, list(m.raw)) for m in parts)
    assert torch.equal(CpuExperts(pool, parts)(*routes()), CpuExperts(pool, lists)(*routes()))


def test_views_of_a_fused_tensor(pool) -> None:
    gate, _, down = matrices()
    up = stack("up", GGMLType.Q8_0, F, D, 9)
    fused = np.empty((EXPERTS, 2 * F, gate.raw.shape[-1]), np.uint8)
    fused[:, 0::2], fused[:, 1::2] = gate.raw, up.raw
    views = [SplitMatrices("gate_up", GGMLType.Q8_0, fused[:, i::2]) for i in (0, 1)]
    whole = CpuExperts(pool, (gate, up, down))(*routes())
    assert torch.equal(CpuExperts(pool, (*views, down))(*routes()), whole)


def test_lazy_packs_only_what_is_routed_to(pool) -> None:
    parts = matrices()
    lazy = CpuExperts(pool, parts, lazy=True)
    assert lazy.nbytes == 0
    hidden, ids, weights = routes(1)
    assert torch.equal(lazy(hidden, ids, weights), CpuExperts(pool, parts)(hidden, ids, weights))
    assert lazy.nbytes == 2 * lazy.layout.nbytes
    np.testing.assert_array_equal(lazy.slab(4), CpuExperts(pool, parts).slab(4))


def test_foreign_types_are_requantised_with_a_note(pool, caplog) -> None:
    parts = matrices()
    rng = np.random.default_rng(4)
    values = rng.standard_normal((EXPERTS, F, 256)).astype(np.float32)
    tq2 = GGMLType.TQ2_0
    foreign = SplitMatrices("odd.weight", tq2, np.stack([quantize(tq2, v) for v in values]))
    down = stack("down", GGMLType.Q8_0, 256, F, 3)
    with caplog.at_level(logging.WARNING):
        experts = CpuExperts(pool, (foreign, foreign, down))
    assert "odd.weight: no kernels for TQ2_0, requantised to Q8_0" in caplog.text
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    _, ids, weights = routes(3)
    near(experts(hidden, ids, weights), twin((foreign, foreign, down), hidden, ids, weights))
    caplog.clear()
    CpuExperts(pool, parts)
    assert not caplog.text


def test_mxfp4_in_neighbour_order(pool) -> None:
    pairs = stack("p", GGMLType.MXFP4, F, D, 1)
    plain = SplitMatrices("q", GGMLType.MXFP4, repack_pairs(pairs.raw))
    pairs = SplitMatrices("p", GGMLType.MXFP4_PAIRS, pairs.raw)
    down = stack("down", GGMLType.Q8_0, D, F, 3)
    assert torch.equal(
        CpuExperts(pool, (pairs, pairs, down))(*routes()),
        CpuExperts(pool, (plain, plain, down))(*routes()),
    )


def test_scales_multiply_the_products(pool) -> None:
    gate, up, down = matrices()
    scales = torch.ones(EXPERTS, 3)
    scales[:, 2] = 4.0
    plain = CpuExperts(pool, (gate, up, down))(*routes())
    assert torch.equal(CpuExperts(pool, (gate, up, down), scales=scales)(*routes()), 4 * plain)


def test_errors(pool) -> None:
    gate, up, down = matrices()
    with pytest.raises(NativeError, match="do not belong together"):
        CpuExperts(pool, (gate, down, up))
    experts = CpuExperts(pool, (gate, up, down))
    hidden, ids, weights = routes()
    with pytest.raises(NativeError, match="expert id 5"):
        experts(hidden, ids * 0 + 5, weights)
    with pytest.raises(NativeError):
        experts(hidden, ids.long(), weights)


def test_progress_counts_all_bytes(pool) -> None:
    seen: list[int] = []
    experts = CpuExperts(pool, matrices(), progress=seen.append)
    assert sum(seen) == experts.nbytes == EXPERTS * experts.layout.nbytes


def test_slab_layout() -> None:
    types = (GGMLType.MXFP4, GGMLType.MXFP4, GGMLType.Q8_0)
    layout = SlabLayout.plan(types, 96, 160, biases=True)
    parts = [*layout.matrices, *(layout.biases or ())]
    assert all(start % 64 == 0 for start, _ in parts)
    assert all(a[1] <= b[0] for a, b in pairwise(parts))
    assert layout.nbytes % 64 == 0
    assert layout.nbytes >= parts[-1][1]


def test_allocated_memory_is_zero_and_aligned() -> None:
    for size in (1, 100, 5 << 20):
        area = allocate(size)
        assert area.shape == (size,)
        assert area.ctypes.data % 64 == 0
        assert not area.any()
        area[:] = 1


def test_pack_of_one_matrix(pool) -> None:
    raw = random_blocks(GGMLType.Q6_K, 40, 256, np.random.default_rng(0))
    packer = Packer(pool)
    packed = packer.add("w", GGMLType.Q6_K, raw)
    packer.flush()
    out = np.empty((40, 256), np.float32)
    native.lib().unpack(int(packed.type), packed.rows, packed.cols, packed.data, out)
    np.testing.assert_array_equal(out, dequantize(GGMLType.Q6_K, raw))
