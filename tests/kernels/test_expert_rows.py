"""The row kernels of streamed experts against their plain torch twins."""

import pytest
import torch

from greenroom.kernels.expert_rows import (
    activated_rows,
    activated_rows_twin,
    add_rows,
    add_rows_twin,
    scaled_rows,
    scaled_rows_twin,
)


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
def test_activated_rows_equal_twin(activation, biased, device):
    torch.manual_seed(1)
    both, tokens = torch.randn(4, 96, device=device), torch.tensor([3, 0, 5, 1], device=device)
    biases = (torch.randn(48, device=device), torch.randn(48, device=device)) if biased else None
    scales = torch.exp2(torch.arange(6, device=device) - 3.0)
    arguments = (both[:, :48], both[:, 48:], biases, scales, tokens, activation)
    found, found_scales = activated_rows(*arguments)
    wanted, wanted_scales = activated_rows_twin(*arguments)
    torch.testing.assert_close(found_scales, wanted_scales)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.3, rtol=2e-3)
    assert wanted.abs().max() >= 255


@pytest.mark.parametrize("biased", [False, True])
def test_add_rows_equals_twin(biased, device):
    torch.manual_seed(2)
    y, tokens = torch.randn(3, 1500, device=device), torch.tensor([4, 0, 2], device=device)
    weights, scales = torch.rand(3, device=device), torch.rand(3, device=device)
    bias = torch.randn(1500, device=device) if biased else None
    found = torch.randn(6, 1500, device=device)
    wanted, before = found.clone(), found.clone()
    add_rows(found, y, tokens, weights, scales, bias)
    add_rows_twin(wanted, y, tokens, weights, scales, bias)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[[1, 3, 5]], before[[1, 3, 5]])
