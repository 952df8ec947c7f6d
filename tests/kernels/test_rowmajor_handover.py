"""The row-major product and the handover to pinned memory against their plain torch twins."""

import pytest
import torch

from greenroom.kernels.handover import publish, publish_twin
from greenroom.kernels.rowmajor import rowmajor, rowmajor_twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(5, 40, 1), (9, 600, 6)])
def test_rowmajor_equals_twin(dtype, rows, cols, tokens, device):
    torch.manual_seed(rows)
    weight = torch.randn(rows, cols, device=device).to(dtype)
    x, bias = torch.randn(tokens, cols, device=device), torch.randn(rows, device=device)
    for given in (None, bias):
        wanted = rowmajor_twin(weight, x, given)
        torch.testing.assert_close(rowmajor(weight, x, given), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("tokens", "width", "k"), [(1, 7, 3), (3, 700, 4), (2, 1, 5)])
def test_publish_equals_twin(tokens, width, k, resident, device):
    hidden = torch.randn(tokens, width, device=device)
    ids = torch.randint(-1, 9, (tokens, k), device=device, dtype=torch.int32)
    weights = torch.rand(tokens, k, device=device)
    table = torch.tensor([-1, 0, 4, -1, -1, 3, -1, -1, 1], dtype=torch.int32, device=device)
    targets = [
        [torch.zeros(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in sources]
        for sources in [(hidden, ids, weights)] * 2
    ]
    publish(hidden, ids, weights, tuple(targets[0]), table if resident else None)
    publish_twin(hidden, ids, weights, tuple(targets[1]), table if resident else None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for found, wanted in zip(*targets, strict=True):
        assert torch.equal(found, wanted)
        assert found.abs().sum() > 0
    assert resident == (not torch.equal(targets[0][1], ids.cpu()))
