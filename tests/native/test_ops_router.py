"""Routing against the published rules, on every tier: which experts, and with what weight."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from greenroom import native


@pytest.fixture(params=native.usable_tiers())
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return native.module(request.param)


def route(
    lib: ModuleType, x: Tensor, weight: Tensor, rule: Any, threads: int = 2, **more: Any
) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "bias": None,
        "selection_bias": None,
        "ids": torch.full((x.shape[0], rule.selected), -1, dtype=torch.int32),
        "weights": torch.full((x.shape[0], rule.selected), torch.nan),
    }
    arguments |= more
    lib.router(lib.Pool(threads), x, weight, rule=rule, **arguments)
    return arguments["ids"], arguments["weights"]


def choose(lib: ModuleType, logits: Tensor, rule: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """The choice for given logits: an identity matrix is the router's weight."""
    return route(lib, logits, torch.eye(logits.shape[1]), rule, **more)


@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [(1, 8, 64), (5, 7, 33), (1, 128, 2048), (70, 60, 100), (130, 32, 288), (33, 3, 1), (0, 4, 8)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_softmax_over_all(
    lib: ModuleType, tokens: int, experts: int, width: int, biased: bool
) -> None:
    torch.manual_seed(experts)
    x, weight, bias = torch.randn(tokens, width), torch.randn(experts, width), torch.randn(experts)
    logits = (x.double() @ weight.double().T) + (bias.double() if biased else 0)
    probabilities, ids = logits.softmax(-1).topk(min(3, experts))
    rule = lib.RouterRule("softmax", ids.shape[1], scale=2.5)
    got_ids, got = route(lib, x, weight, rule, bias=bias if biased else None)
    assert torch.equal(got_ids.long(), ids)
    torch.testing.assert_close(got, probabilities.float() * 2.5, rtol=1e-4, atol=1e-6)


def test_renormalised_softmax_is_softmax_over_the_selected(lib: ModuleType) -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 64) * 4
    values, ids = logits.topk(8)
    for rule in (lib.RouterRule("softmax", 8, True), lib.RouterRule("softmax_selected", 8)):
        got_ids, got = choose(lib, logits, rule)
        assert torch.equal(got_ids.long(), ids)
        torch.testing.assert_close(got, values.softmax(-1), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("gating", ["softmax", "softmax_selected", "sigmoid"])
def test_ties_go_to_the_lower_id(lib: ModuleType, gating: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, _ = choose(lib, logits, lib.RouterRule(gating, 3))
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2]]


def test_all_experts_selected(lib: ModuleType) -> None:
    logits = torch.randn(9, 5)
    ids, weights = choose(lib, logits, lib.RouterRule("softmax", 5))
    assert torch.equal(ids.long(), logits.argsort(-1, descending=True))
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([3.0, 2.5, 1.0, -2.0], [(0, 1.0), (1, 1.0)]),
        ([3.0, 2.96, 2.93, -1.0], [(0, 0.509999), (1, 0.507499)]),
        ([-0.5, -1.0, -1.01, -3.0], [(0, 1.0), (1, 0.502500)]),
        ([0.0, 0.0, -1.0, -2.0], [(0, 0.5), (1, 1.0)]),  # 0 / 0 counts as tied
    ],
)
def test_sparse_mixer(
    lib: ModuleType, logits: list[float], expected: list[tuple[int, float]]
) -> None:
    ids, weights = choose(lib, torch.tensor([logits]), lib.RouterRule("sparse_mixer", 2))
    assert ids[0].tolist() == [expert for expert, _ in expected]
    assert weights[0].tolist() == pytest.approx([weight for _, weight in expected], abs=1e-6)


def test_sparse_mixer_equals_the_published_rule(lib: ModuleType) -> None:
    torch.manual_seed(3)
    scores = torch.randn(500, 16)
    scores[::3] *= 0.02  # many near ties
    scores[1::3] -= 5  # all negative
    ids, weights = choose(lib, scores, lib.RouterRule("sparse_mixer", 2))
    left = scores.clone()
    for i in range(2):
        most, best = left.max(-1, keepdim=True)
        gap = (most - scores) / torch.maximum(scores.abs(), most)
        kept = left.masked_fill(gap > 0.02, -torch.inf)
        assert torch.equal(ids[:, i].long(), best[:, 0])
        torch.testing.assert_close(weights[:, i], kept.softmax(-1).gather(-1, best)[:, 0])
        left = left.scatter(-1, best, -torch.inf)


@pytest.mark.parametrize(("groups", "used"), [(1, 1), (4, 2), (8, 3)])
def test_sigmoid_with_selection_bias_and_groups(lib: ModuleType, groups: int, used: int) -> None:
    torch.manual_seed(groups)
    logits, bias = torch.randn(100, 32), torch.randn(32)
    scores = logits.sigmoid()
    biased = scores + bias
    best_two = biased.view(100, groups, -1).topk(2).values.sum(-1)
    keep = torch.zeros(100, groups, dtype=torch.bool).scatter(-1, best_two.topk(used).indices, True)
    masked = biased.view(100, groups, -1).masked_fill(~keep[..., None], -torch.inf).view(100, 32)
    chosen = masked.topk(4).indices
    wanted = scores.gather(-1, chosen)
    wanted = wanted / wanted.sum(-1, keepdim=True) * 2.5
    rule = lib.RouterRule("sigmoid", 4, True, 2.5, groups, used)
    ids, weights = choose(lib, logits, rule, selection_bias=bias)
    assert torch.equal(ids.long(), chosen)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)


def test_neither_threads_nor_batch_change_a_bit(lib: ModuleType) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(75, 300), torch.randn(40, 300)
    rule = lib.RouterRule("softmax", 6)
    ids, weights = route(lib, x, weight, rule, threads=1)
    again_ids, again = route(lib, x, weight, rule, threads=5)
    assert torch.equal(ids, again_ids)
    assert torch.equal(weights, again)
    for token in (0, 1, 2, 3, 74):
        one_ids, one = route(lib, x[token : token + 1], weight, rule)
        assert torch.equal(one_ids[0], ids[token])
        assert torch.equal(one[0], weights[token])


@pytest.mark.parametrize("gating", ["softmax", "softmax_selected", "sigmoid", "sparse_mixer"])
@pytest.mark.parametrize("value", [1e30, -1e30, float("nan"), float("inf"), -float("inf")])
def test_ids_stay_valid_and_distinct(lib: ModuleType, gating: str, value: float) -> None:
    logits = torch.randn(6, 6)
    logits[range(6), range(6)] = value
    logits[0] = value
    x = torch.eye(6)
    weight = logits.T.contiguous()  # products with zeros turn infinities into NaN: also welcome
    ids, _ = route(lib, x, weight, lib.RouterRule(gating, 2))
    assert ((ids >= 0) & (ids < 6)).all()
    assert (ids[:, 0] != ids[:, 1]).all()


def test_wrong_arguments_are_refused(lib: ModuleType) -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    rule = lib.RouterRule("softmax", 2)

    def refused(match: str, *arguments: Any, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            route(lib, *arguments, **more)

    refused("weight", x, torch.randn(5, 9), rule)
    refused("weight.*float32", x, weight.double(), rule)
    refused("fewer experts", x, weight[:1], rule)
    refused("groups", x, weight, lib.RouterRule("sigmoid", 2, groups=2))
    refused("bias", x, weight, rule, bias=torch.zeros(4))
    refused("selection_bias", x, weight, rule, selection_bias=torch.zeros(6))
    refused("ids", x, weight, rule, ids=torch.empty(3, 3, dtype=torch.int32))
    refused("ids", x, weight, rule, ids=torch.empty(3, 2, dtype=torch.int64))
    refused("weights", x, weight, rule, weights=torch.empty(2, 2))
    bad = [("other", 2), ("softmax", 0), ("softmax", 2, True, 1.0, 0), ("sparse_mixer", 3)]
    for arguments in bad:
        with pytest.raises(ValueError, match=r"gating|selected|groups"):
            lib.RouterRule(*arguments)
    with pytest.raises(ValueError, match="groups_used"):
        lib.RouterRule("sigmoid", 2, groups=2, groups_used=3)
