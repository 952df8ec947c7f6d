"""Experts in slots against the plain experts on the same dequantised slabs."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.experts.reference import ReferenceExperts
from greenroom.experts.slabs import SlabLayout
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.experts import hits
from greenroom.kernels.packed import FORMATS

FLOATS = (0, 1, 30)
SUPER = (10, 11, 12, 13, 14, 23)  # of 256 columns; under the interpreter others are tested smaller


def bank(kinds, d, f, experts, biased, seed=0):
    """(layout, slabs (experts, nbytes) uint8, float32 matrices, biases or None)."""
    lib, rng = native.lib(), np.random.default_rng(seed)
    pool = lib.Pool(1)
    layout = SlabLayout.plan(tuple(GGMLType(k) for k in kinds), d, f, biased)
    slabs = np.zeros((experts, layout.nbytes), np.uint8)
    matrices = [np.empty((experts, r, c), np.float32) for r, c in ((f, d), (f, d), (d, f))]
    biases = [rng.standard_normal((experts, n), np.float32) for n in (f, f, d)]
    for expert in range(experts):
        for i, kind in enumerate(kinds):
            rows, cols = matrices[i].shape[1:]
            if kind == 0:
                raw = rng.standard_normal((rows, cols), np.float32).view(np.uint8)
            elif kind in FLOATS:
                values = torch.randn(rows, cols)
                half = values.half() if kind == 1 else values.bfloat16()
                raw = half.view(torch.uint8).numpy()
            else:
                raw = random_blocks(GGMLType(kind), rows, cols, rng)
            part = layout.matrix(slabs[expert], i)
            lib.pack(pool, kind, rows, cols, np.ascontiguousarray(raw).reshape(-1), part)
            lib.unpack(kind, rows, cols, part, matrices[i][expert])
            if biased:
                layout.bias(slabs[expert], i)[:] = biases[i][expert]
    floats = [torch.from_numpy(m) for m in matrices]
    return layout, torch.from_numpy(slabs), floats, [torch.from_numpy(b) for b in biases]


def routes(tokens, k, experts, seed=0):
    torch.manual_seed(seed)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    return ids, torch.rand(tokens, k)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, id=GGMLType(k).name) for k in (*FORMATS, *FLOATS)]
)
def test_hits_equal_the_plain_experts(kind, device):
    d, f = (72, 40) if kind in FLOATS else (256, 256) if kind in SUPER else (192, 64)
    layout, slabs, floats, biases = bank([kind] * 3, d, f, 3, True)
    plain = ReferenceExperts(*floats, tuple(biases), "gpt-oss")
    hidden = torch.randn(2, d) / 16
    ids, weights = routes(2, 2, 3)
    order = torch.tensor([2, 0, 1])  # slots hold other experts than their number says
    table = torch.argsort(order).int().to(device)
    found = hits(
        slabs[order].to(device), table, layout, *(t.to(device) for t in (hidden, ids, weights)),
        activation="gpt-oss",
    )  # fmt: skip
    wanted = plain(hidden, ids, weights)
    scale = wanted.abs().max()
    torch.testing.assert_close(found.cpu() / scale, wanted / scale, atol=2e-5, rtol=1e-4)


def test_misses_and_padding_add_nothing(device):
    layout, slabs, floats, _ = bank([12, 12, 14], 256, 256, 4, False)
    plain = ReferenceExperts(*floats)
    hidden, (ids, weights) = torch.randn(5, 256), routes(5, 2, 4)
    ids[3] = -1
    ids[4] = torch.tensor([1, 3])
    table = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    memory = slabs[torch.tensor([2, 0])]
    found = hits(memory.to(device), table.to(device), layout,
                 *(t.to(device) for t in (hidden, ids, weights))).cpu()  # fmt: skip
    kept = torch.where((ids >= 0) & (table[ids.clamp(min=0)] >= 0), weights, 0.0)
    wanted = plain(hidden, ids.clamp(min=0), kept)
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    assert (found[3:] == 0).all()
    assert found[0].abs().sum() > 0
