"""Norms, rotary embedding and cache writes against their plain torch twins."""

import pytest
import torch

from greenroom.kernels.norm import norm, norm_twin
from greenroom.kernels.rope import rotate, rotate_twin, write_kv, write_kv_twin


@pytest.mark.parametrize("width", [1, 48, 100, 2880])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_equals_twin(width, centred, with_residual, device):
    torch.manual_seed(width)
    x = torch.randn(3, width, device=device) * 5 + 2
    weight = torch.randn(width, device=device)
    bias = torch.randn(width, device=device) if centred else None
    residuals = [None, None]
    if with_residual:
        residuals = [torch.randn(3, width, device=device)] * 2
        residuals = [r.clone() for r in residuals]
    got = norm(x, weight, 1e-5, bias, residuals[0])
    wanted = norm_twin(x, weight, 1e-5, bias, residuals[1])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if with_residual:
        torch.testing.assert_close(residuals[0], residuals[1])


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("rotated", [64, 24])
def test_rotate_equals_twin_at_far_positions(neox, rotated, device):
    torch.manual_seed(rotated)
    x = torch.randn(5, 3, 64, device=device)
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=device)
    frequencies = 150000.0 ** (-torch.arange(0, rotated, 2, device=device) / rotated)
    wanted = rotate_twin(x, positions, frequencies, 1.25, neox)
    got = rotate(x.clone(), positions, frequencies, 1.25, neox)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(got[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_write_kv_equals_twin_and_skips_padding(dtype, device):
    torch.manual_seed(0)
    k, v = torch.randn(4, 2, 48, device=device), torch.randn(4, 2, 32, device=device)
    slots = torch.tensor([5, 37, -1, 16], device=device)
    caches = [torch.zeros(3, 2, 16, d, dtype=dtype, device=device) for d in (48, 32, 48, 32)]
    write_kv(k, v, slots, *caches[:2])
    write_kv_twin(k, v, slots, *caches[2:])
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert caches[0].abs().sum() > 0
