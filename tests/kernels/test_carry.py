"""Numbers that reach the device without a copy command."""

import torch

from greenroom.kernels.carry import carry


def test_carry_copies(device):
    source = torch.arange(2500, dtype=torch.int32, device=device).view(4, 625)
    target = torch.zeros_like(source)
    carry(source, target)
    assert torch.equal(source, target)
