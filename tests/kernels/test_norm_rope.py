"""Norms, rotary embedding and cache writes against their plain torch twins."""

import pytest
import torch
from kernel_help import together

from greenroom.kernels.norm import norm, norm_twin
from greenroom.kernels.planes import NATURAL, PERMUTED, split
from greenroom.kernels.rope import enter, enter_twin


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
    got, planes = norm(x, weight, 1e-5, bias, residuals[0])
    assert planes is None
    wanted = norm_twin(x, weight, 1e-5, bias, residuals[1])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if with_residual:
        torch.testing.assert_close(residuals[0], residuals[1])


@pytest.mark.parametrize("kind", [NATURAL, PERMUTED])
@pytest.mark.parametrize("width", [32, 96, 1056])
@pytest.mark.parametrize("centred", [False, True])
def test_norm_cuts_its_result_as_split_does(kind, width, centred, device):
    torch.manual_seed(width)
    x, weight = torch.randn(3, width, device=device), torch.randn(width, device=device)
    bias = torch.randn(width, device=device) if centred else None
    residual = torch.randn(3, width, device=device)
    wanted = norm_twin(x, weight, 1e-5, bias, residual.clone())
    got, planes = norm(x, weight, 1e-5, bias, residual, kind)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert planes is not None
    words, units = split(got, kind)
    # a compiled norm may fuse the product it cuts: the last of 23 bits may differ
    torch.testing.assert_close(planes[1], units, rtol=1e-6, atol=1e-6)
    assert (together(planes[0]) - together(words)).abs().max() <= 2
    if device.type == "cpu":
        assert torch.equal(planes[0], words)


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("turned", [0, 24, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_enter_equals_twin_at_far_positions(
    neox, turned, heads, kv_heads, tokens, dtype, device
) -> None:
    entered(neox, turned, heads, kv_heads, tokens, dtype, device, normed=False)


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("turned", [0, 24, 64])
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float16), (5, torch.float32)])
def test_enter_normalises_heads_first(neox, turned, tokens, dtype, device) -> None:
    entered(neox, turned, 6, 2, tokens, dtype, device, normed=True)


def entered(neox, turned, heads, kv_heads, tokens, dtype, device, normed) -> None:
    torch.manual_seed(turned)
    sizes = [heads * 64, kv_heads * 64, kv_heads * 48]
    row = torch.randn(tokens, sum(sizes) + 5, device=device)  # columns of one product

    def parts(row):
        q, k, v, _ = row.split([*sizes, 5], 1)
        return q.view(tokens, heads, 64), k.view(tokens, kv_heads, 64), v.view(tokens, kv_heads, 48)

    positions = torch.tensor([0, 1, 77, 4095, 131071] * 4, device=device)[-tokens:]
    slots = torch.randperm(48, device=device)[:tokens]
    slots[1:2] = -1  # padding
    frequencies = None
    if turned:
        frequencies = 150000.0 ** (-torch.arange(0, turned, 2, device=device) / turned)
    weights = torch.rand(2, 64, device=device) + 0.5
    turn = (positions, frequencies, 1.25, neox, (*weights, 1e-2) if normed else None)
    caches = [torch.zeros(3, kv_heads, 16, d, dtype=dtype, device=device) for d in (64, 48, 64, 48)]
    found, wanted = row.clone(), row.clone()
    enter(*parts(found), slots, *caches[:2], *turn)
    enter_twin(*parts(wanted), slots, *caches[2:], *turn)
    close = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(found, wanted, **close)
    assert torch.equal(found[:, sizes[0] :], row[:, sizes[0] :])
    if turned or normed:
        assert not torch.equal(found, row)
    if dtype == torch.float16:
        close = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(caches[0], caches[2], **close)
    if not normed:
        assert torch.equal(caches[0][..., turned:], caches[2][..., turned:])
    assert torch.equal(caches[1], caches[3])
    assert int((caches[1] != 0).any(-1).sum()) == kv_heads * int((slots >= 0).sum())
