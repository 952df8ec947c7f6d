"""Norms, the plain experts and the MoE block against their formulas."""

import pytest
import torch

from greenroom.experts.reference import ReferenceExperts, clamped_product
from greenroom.layers.moe import Moe, SharedExpert
from greenroom.layers.norm import Norm
from greenroom.layers.router import Router, Rule


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("gate", "up", "expected"), [(10.0, -9.0, -41.99972), (1.0, 1.0, 1.691592)]
)
def test_clamped_swiglu(gate: float, up: float, expected: float) -> None:
    found = clamped_product(torch.tensor(gate), torch.tensor(up))
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_norms_add_the_residual_in_place(centred: bool) -> None:
    x, delta, weight, bias = (
        random(3, 8),
        random(3, 8, seed=1),
        random(8, seed=2),
        random(8, seed=3),
    )
    both = x + delta
    middle = both.mean(-1, keepdim=True) if centred else 0.0
    spread = ((both - middle).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = Norm(weight, bias, 1e-5, centred)(x, delta)
    torch.testing.assert_close(found, (both - middle) / spread * weight + bias)
    assert torch.equal(x, both)


def test_experts_weigh_and_add_what_each_computes() -> None:
    gate, up, down = random(4, 6, 8), random(4, 6, 8, seed=1), random(4, 8, 6, seed=2)
    biases = (random(4, 6, seed=3), random(4, 6, seed=4), random(4, 8, seed=5))
    experts = ReferenceExperts(gate, up, down, biases, "gpt-oss")
    x = random(5, 8, seed=6)
    ids = torch.tensor([[0, 3], [3, 1], [2, 0], [1, 2], [3, 0]], dtype=torch.int32)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(7))
    expected = torch.zeros(5, 8)
    for token in range(5):
        for e, weight in zip(ids[token].tolist(), weights[token], strict=True):
            inner = clamped_product(
                gate[e] @ x[token] + biases[0][e], up[e] @ x[token] + biases[1][e]
            )
            expected[token] += weight * (down[e] @ inner + biases[2][e])
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_expert_is_added_through_its_gate() -> None:
    x, gate = random(4, 8), random(8, seed=1)
    router = Router(torch.zeros(2, 8), None, Rule("softmax", 1))
    experts = ReferenceExperts(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 8, 3))
    block = Moe(router, experts, SharedExpert(Doubled(), gate))
    torch.testing.assert_close(block(x), 2 * x * torch.sigmoid(x @ gate)[:, None])


class Doubled:
    nbytes = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x
