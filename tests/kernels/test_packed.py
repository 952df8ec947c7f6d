"""Triton kernels on packed weights against the native unpacking of the same bytes."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.dequantise import dequantise
from greenroom.kernels.matvec import matvec, matvec_twin
from greenroom.kernels.packed import FORMATS

KINDS = [pytest.param(kind, id=GGMLType(kind).name) for kind in FORMATS]


def packed_matrix(kind, rows, cols, seed, device):
    """(packed bytes, the same matrix as float32) of random valid blocks."""
    lib = native.lib()
    raw = random_blocks(GGMLType(kind), rows, cols, np.random.default_rng(seed))
    packed = np.zeros(lib.packed_bytes(kind, rows, cols), np.uint8)
    lib.pack(lib.Pool(1), kind, rows, cols, raw.reshape(-1), packed)
    weights = np.empty((rows, cols), np.float32)
    lib.unpack(kind, rows, cols, packed, weights)
    return torch.from_numpy(packed).to(device), torch.from_numpy(weights).to(device)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_native_layout(kind):
    form = FORMATS[kind]
    for rows, cols in [(1, 256), (17, 512), (100, 768)]:
        wanted = native.lib().packed_bytes(kind, rows, cols)
        assert -(-rows // 16) * form.group_bytes(cols) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(16, 256, 1), (37, 512, 3), (48, 256, 6)])
def test_matvec_equals_twin(kind, rows, cols, tokens, device):
    packed, weights = packed_matrix(kind, rows, cols, rows, device)
    torch.manual_seed(tokens)
    x, bias = torch.randn(tokens, cols, device=device), torch.randn(rows, device=device)
    wanted = matvec_twin(weights, x, bias)
    torch.testing.assert_close(
        matvec(packed, kind, rows, cols, x, bias), wanted, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(16, 256), (21, 768)])
def test_dequantise_equals_native_unpacking(kind, rows, cols, device):
    packed, weights = packed_matrix(kind, rows, cols, cols, device)
    got = dequantise(packed, kind, torch.empty_like(weights))
    torch.testing.assert_close(got, weights, atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", [12, 39])
def test_columns_beyond_one_pass(kind, device):
    packed, weights = packed_matrix(kind, 16, 2816, 5, device)
    x = torch.randn(1, 2816, device=device)
    torch.testing.assert_close(
        matvec(packed, kind, 16, 2816, x), matvec_twin(weights, x), atol=2e-4, rtol=2e-4
    )
