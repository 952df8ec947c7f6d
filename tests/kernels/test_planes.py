"""Activations cut into planes of bytes: against plain torch, and put together again."""

import pytest
import torch
from kernel_help import together

from greenroom.kernels.lines import Walk
from greenroom.kernels.planes import NATURAL, PERMUTED, PLANES, order, split, split_twin


@pytest.mark.parametrize("kind", [NATURAL, PERMUTED])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 1056)])
def test_split_equals_its_twin(kind, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(kind)) * torch.logspace(
        -6, 4, shape[1]
    )
    x[0, :16] = 0
    x[-1, 17] = -1e4
    words, units = split(x.to(device), kind)
    wanted, wanted_units = split_twin(x, kind)
    torch.testing.assert_close(units.cpu()[..., 0], wanted_units[..., 0], rtol=1e-5, atol=1e-30)
    # sixteen float32 added in another order: up to 15 roundings of at most the sum of magnitudes
    magnitudes = torch.nn.functional.pad(x.abs(), (0, -shape[1] % 16)).unflatten(1, (-1, 16)).sum(2)
    apart = (units.cpu()[..., 1] - wanted_units[..., 1]).abs()
    assert (apart <= 2 * 15 * 2.0**-24 * magnitudes).all()
    # the unit may differ in its last bit, which is one of the last plane's, and so may rounding
    assert (together(words) - together(wanted)).abs().max() <= 2


def test_planes_put_together_are_the_activations(device):
    x = torch.randn(2, 64)
    words, units = split(x.to(device), NATURAL)
    planes = words.cpu().view(torch.int8).view(2, PLANES, 64).float()
    whole = (planes[:, 0] * 256 + planes[:, 1]) * 256 + planes[:, 2]
    found = whole.view(2, 4, 16) * units.cpu()[..., :1]
    two_units = float(x.abs().max()) * 2**-22  # half of one by rounding, one by the unit itself
    torch.testing.assert_close(found.view(2, 64), x, rtol=0, atol=two_units)


def test_only_formats_of_whole_numbers_use_planes():
    orders = {kind: order(Walk.of(kind, 256).constants) for kind in (0, 1, 8, 12, 20, 30, 39, 40)}
    none = dict.fromkeys((0, 1, 20, 30), 0)
    assert orders == none | {8: NATURAL, 12: NATURAL, 39: PERMUTED, 40: PERMUTED}
