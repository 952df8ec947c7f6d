"""The kernels of streamed experts against their plain torch twins."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.dequantise import dequantise, dequantise_group
from greenroom.kernels.expert_rows import (
    activated_rows,
    activated_rows_twin,
    add_rows,
    add_rows_twin,
    scaled_rows,
    scaled_rows_twin,
)
from greenroom.kernels.grouped import Group, Routes, product, product_twin

EXPERTS, TOKENS, K = 7, 40, 3
FIRST, MEMBERS = 2, (5, 0, 3, 1)  # expert 0 gets no tokens
PASSES = [(0, None), (0, 9), (9, 11), (20, None)]  # rows before a pass, and of it


def routed(device) -> tuple[Routes, Group]:
    """Routes of tokens to different experts, and a group of four of them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:K] for _ in range(TOKENS)])
    ids, weights = (ids + 1).int(), torch.rand(TOKENS, K, generator=generator)
    sizes = torch.bincount(ids.view(-1), minlength=EXPERTS).tolist()
    table = torch.full((4, EXPERTS), -1, dtype=torch.int32)
    table[0], base = 0, 0
    for i, expert in enumerate(MEMBERS):
        table[0, FIRST + i] = expert
        table[1:, expert] = torch.tensor([base, (3 * i + 1) % 4, 6], dtype=torch.int32)
        base += sizes[expert]
    routes = Routes.sort(ids.to(device), weights.to(device), table.to(device))
    return routes, Group(6, FIRST, tuple(sizes[e] for e in MEMBERS))


def test_routes_are_sorted_by_expert(device):
    routes, group = routed(device)
    flat = routes.ids.view(-1)
    assert torch.equal(flat[torch.argsort(routes.places)], flat.sort(stable=True)[0])
    owners = torch.arange(TOKENS * K, device=device).int() // K
    assert torch.equal(routes.tokens[routes.places.long()], owners)
    assert routes.starts.tolist()[0] == 0
    assert routes.starts.tolist()[-1] == TOKENS * K
    assert sum(group.within(5, 30)) == 30
    assert group.counts[1] == 0


@pytest.mark.parametrize(("skip", "rows"), PASSES)
@pytest.mark.parametrize(("n", "cols", "gather"), [(40, 64, True), (150, 72, False)])
def test_product_equals_twin(skip, rows, n, cols, gather, device):
    routes, group = routed(device)
    rows = group.rows - skip if rows is None else rows
    torch.manual_seed(n)
    a = torch.randn(TOKENS if gather else rows, cols, device=device).half()
    b = torch.randn(len(MEMBERS), n, cols, device=device).half()
    found = product(a, b, routes, group, skip, rows, gather)
    wanted = product_twin(a, b, routes, group, skip, rows, gather)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", [39, 12, 30])
def test_a_group_of_matrices_equals_each(kind, device):
    routes, group = routed(device)
    lib, rows, cols, start = native.lib(), 21, 256, 64
    nbytes = lib.packed_bytes(kind, rows, cols)
    slabs = np.zeros((4, start + nbytes), np.uint8)
    for i, slab in enumerate(slabs):
        raw = random_blocks(GGMLType(kind), rows, cols, np.random.default_rng(i))
        lib.pack(lib.Pool(1), kind, rows, cols, raw.reshape(-1), slab[start:])
    there = torch.from_numpy(slabs).to(device)
    both = torch.zeros(len(MEMBERS), rows + 3, cols, dtype=torch.float16, device=device)
    dequantise_group(there, start, kind, both[:, 3:], routes, group)
    for i, expert in enumerate(MEMBERS):
        slab = there[int(routes.table[2, expert])]
        wanted = dequantise(slab[start:], kind, torch.empty(rows, cols, device=device).half())
        assert torch.equal(both[i, 3:].view(torch.int16), wanted.view(torch.int16))
    assert (both[:, :3] == 0).all()


@pytest.mark.parametrize("cols", [1, 40, 700])
def test_scaled_rows_equal_twin_and_never_overflow(cols, device):
    torch.manual_seed(cols)
    x = torch.randn(5, cols, device=device) * torch.logspace(-9, 9, 5, device=device)[:, None]
    x[1] = 0
    half, scales = scaled_rows(x)
    wanted, wanted_scales = scaled_rows_twin(x)
    assert torch.equal(half, wanted)
    assert torch.equal(scales, wanted_scales)
    assert torch.isfinite(half).all()
    back = half.float() * scales[:, None]
    torch.testing.assert_close(back, x, atol=1e-3 * float(x[2].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "gpt-oss"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("skip", "rows"), PASSES)
def test_activated_rows_equal_twin(activation, biased, skip, rows, device):
    torch.manual_seed(1)
    routes, group = routed(device)
    rows = group.rows - skip if rows is None else rows
    both = torch.randn(rows, 96, device=device)
    slabs = torch.randn(4, 160, device=device).view(torch.uint8)
    scales = torch.exp2(torch.arange(TOKENS, device=device) % 6 - 3.0)
    biases = (64, 320) if biased else None
    arguments = (both, slabs, biases, scales, routes, group, skip, activation)
    found, found_scales = activated_rows(*arguments)
    wanted, wanted_scales = activated_rows_twin(*arguments)
    torch.testing.assert_close(found_scales, wanted_scales)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.3, rtol=2e-3)
    assert wanted.abs().max() >= 255


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("skip", "rows"), PASSES)
def test_add_rows_equals_twin(biased, scaled, skip, rows, device):
    torch.manual_seed(2)
    routes, group = routed(device)
    rows = group.rows - skip if rows is None else rows
    y = torch.randn(rows, 1500, device=device)
    slabs = torch.randn(4, 1600, device=device).view(torch.uint8) if biased else None
    scales = torch.rand(rows, device=device) if scaled else None
    found = torch.randn(TOKENS, 1500, device=device)
    wanted = found.clone()
    arguments = (y, scales, slabs, 64 if biased else None, routes, group, skip)
    before = found.clone()
    add_rows(found, *arguments)
    add_rows_twin(wanted, *arguments)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, before)
