"""Expert logits, choice and weights against the plain rules."""

import pytest
import torch

from greenroom.kernels.router import choose, logits
from greenroom.layers.device_router import FEW, DeviceRouter
from greenroom.layers.router import Router, Rule

RULES = [
    Rule("softmax", 3),
    Rule("softmax", 8, renormalise=True),
    Rule("softmax", 6, scale=2.5),
    Rule("softmax", 1),
    Rule("softmax_selected", 4),
    Rule("sparse_mixer", 2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (5, 9), (FEW + 1, 60)])
@pytest.mark.parametrize("biased", [False, True])
def test_routes_equal_the_plain_rules(rule, tokens, experts, biased, device) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(tokens, 100), torch.randn(experts, 100) / 10
    bias = torch.randn(experts) if biased else None
    wanted_ids, wanted = Router(weight, bias, rule)(x)
    router = DeviceRouter(weight.to(device), None if bias is None else bias.to(device), rule)
    ids, weights = router(x.to(device))
    assert ids.dtype == torch.int32
    assert torch.equal(ids.cpu(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_near_ties_of_sparse_mixer(spread, device) -> None:
    torch.manual_seed(3)
    values = torch.randn(40, 1) + spread * torch.randn(40, 16)
    wanted_ids, wanted = Rule("sparse_mixer", 2)(values)
    ids, weights = choose(values.to(device), "sparse_mixer", 2)
    assert torch.equal(ids.cpu(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted < 0.99).any()


def test_equal_logits_go_to_the_lower_expert(device) -> None:
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    ids, weights = choose(values.to(device), "softmax_selected", 3)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("gating", ["softmax", "softmax_selected", "sparse_mixer"])
def test_what_is_no_number_still_names_an_expert(gating, device) -> None:
    values = torch.full((2, 6), float("nan"))
    ids, _ = choose(values.to(device), gating, 2)
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize("width", [1, 2880, 5000])
def test_logits_are_exact_float32(width, device) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(3, width), torch.randn(7, width)
    found = logits(x.to(device), weight.to(device), None).cpu()
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(found.double(), wanted, atol=2e-6 * width, rtol=1e-5)
