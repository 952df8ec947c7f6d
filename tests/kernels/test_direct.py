"""Products straight from packed matrices of experts, against the plain product of their numbers."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels import direct as module
from greenroom.kernels.dequantise import dequantise_group
from greenroom.kernels.direct import direct
from greenroom.kernels.grouped import Group, Routes, product_twin
from greenroom.kernels.packed import FORMATS

EXPERTS, TOKENS, K = 6, 23, 2
KINDS = [pytest.param(kind, id=GGMLType(kind).name) for kind in FORMATS]


def routed(device):
    """Routes in which one expert has nothing to do and one has nearly everybody."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([1 + torch.randperm(EXPERTS - 1, generator=generator)[:K]] * TOKENS)
    for i in range(8):
        ids[i] = 1 + torch.randperm(EXPERTS - 1, generator=generator)[:K]
    slots = torch.tensor([3, 0, 5, 4, 1, 2], dtype=torch.int32)
    weights = torch.rand(TOKENS, K, generator=generator)
    routes = Routes.all_in(ids.int().to(device), weights.to(device), slots.to(device))
    counts = torch.bincount(ids.view(-1), minlength=EXPERTS).tolist()
    return routes, Group(0, 0, tuple(counts))


def packed_slabs(kind, n, cols, start, device):
    """(slabs, bytes) uint8 with a matrix of random blocks from byte `start` on."""
    lib = native.lib()
    slabs = np.zeros((EXPERTS, start + lib.packed_bytes(kind, n, cols)), np.uint8)
    for i, slab in enumerate(slabs):
        raw = random_blocks(GGMLType(kind), n, cols, np.random.default_rng(i))
        lib.pack(lib.Pool(1), kind, n, cols, raw.reshape(-1), slab[start:])
    return torch.from_numpy(slabs).to(device)


def expanded(slabs, start, kind, n, cols, routes, group, device):
    both = torch.zeros(EXPERTS, n, cols, dtype=torch.float16, device=device)
    return dequantise_group(slabs, start, kind, both, routes, group)


@pytest.mark.parametrize("kind", KINDS)
def test_direct_equals_the_product_of_expanded_matrices(kind, device):
    routes, group = routed(device)
    n, cols, start = 40, 256, 64
    slabs = packed_slabs(kind, n, cols, start, device)
    a = torch.randn(TOKENS, cols, generator=torch.Generator().manual_seed(1)).half().to(device)
    out = torch.full((group.rows, n + 8), 7.0, device=device)
    direct(a, slabs, start, kind, out[:, 4:-4], routes, group, 0, gather=True)
    b = expanded(slabs, start, kind, n, cols, routes, group, device)
    wanted = product_twin(a, b, routes, group, 0, group.rows, gather=True)
    scale = wanted.abs().max()
    torch.testing.assert_close(out[:, 4:-4] / scale, wanted / scale, atol=1e-5, rtol=1e-4)
    assert (out[:, :4] == 7).all()  # nothing beside its columns
    assert (out[:, -4:] == 7).all()


@pytest.mark.parametrize("shape", [(32, 128, 2, 4, 2), (64, 128, 2, 4, 2), (128, 32, 4, 4, 2)])
@pytest.mark.parametrize(("skip", "rows"), [(0, None), (5, 9), (17, None)])
def test_direct_in_passes_and_tiles(shape, skip, rows, device, monkeypatch):
    routes, group = routed(device)
    monkeypatch.setattr(module, "tile", lambda rows, device: shape)
    rows = group.rows - skip if rows is None else rows
    n, cols = 150, 96  # no whole tile, and no whole step where four blocks are one
    slabs = packed_slabs(39, n, cols, 0, device)
    a = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2)).half().to(device)
    out = torch.empty(rows, n, device=device)
    direct(a, slabs, 0, 39, out, routes, group, skip, gather=False)
    b = expanded(slabs, 0, 39, n, cols, routes, group, device)
    wanted = product_twin(a, b, routes, group, skip, rows, gather=False)
    scale = wanted.abs().max()
    torch.testing.assert_close(out / scale, wanted / scale, atol=1e-5, rtol=1e-4)
