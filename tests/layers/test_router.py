"""Router rules against worked examples, transformers' SparseMixer, and each other."""

import pytest
import torch

from greenroom.layers.router import Router, Rule, softmax_top_k, sparse_mixer, top_k_softmax

EXAMPLES = [  # logits, then SparseMixer's and the normalised top-2's experts with weights
    ((3.0, 2.5, 1.0, -2.0), ((0, 1.0), (1, 1.0)), ((0, 0.622459), (1, 0.377541))),
    ((3.0, 2.96, 2.93, -1.0), ((0, 0.509999), (1, 0.507499)), ((0, 0.509999), (1, 0.490001))),
    ((-0.5, -1.0, -1.01, -3.0), ((0, 1.0), (1, 0.502500)), ((0, 0.622459), (1, 0.377541))),
]


@pytest.mark.parametrize(("logits", "mixer", "normalised"), EXAMPLES)
def test_worked_examples(logits: tuple, mixer: tuple, normalised: tuple) -> None:
    row = torch.tensor([logits])
    rules = (Rule("sparse_mixer", 2), mixer), (Rule("softmax", 2, renormalise=True), normalised)
    for rule, expected in rules:
        ids, weights = rule(row)
        assert ids.dtype == torch.int32
        assert ids[0].tolist() == [expert for expert, _ in expected]
        assert weights[0].tolist() == pytest.approx([w for _, w in expected], abs=1e-6)


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_sparse_mixer_equals_transformers(spread: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    generator = torch.Generator().manual_seed(5)
    centre = torch.randn(400, 1, generator=generator)
    logits = centre + spread * torch.randn(400, 16, generator=generator)
    weights, ids = sparsemixer(logits, jitter_eps=0.01, training=False)
    found_ids, found_weights = sparse_mixer(logits)
    assert torch.equal(found_ids.long(), ids)
    torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-6)


def test_sparse_mixer_keeps_zeros_as_ties() -> None:
    ids, weights = sparse_mixer(torch.zeros(1, 4))
    assert len(set(ids[0].tolist())) == 2
    assert weights[0].tolist() == pytest.approx([0.25, 1 / 3])


def test_normalising_is_the_softmax_over_the_chosen() -> None:
    logits = torch.randn(50, 13, generator=torch.Generator().manual_seed(2)) * 3
    plain_ids, plain = softmax_top_k(logits, 5)
    probabilities = torch.softmax(logits, -1)
    torch.testing.assert_close(plain, probabilities.gather(1, plain_ids.long()))
    ids, weights = softmax_top_k(logits, 5, renormalise=True, scale=2.5)
    torch.testing.assert_close(weights, 2.5 * plain / plain.sum(-1, keepdim=True))
    chosen_ids, chosen = top_k_softmax(logits, 5)
    assert torch.equal(ids, chosen_ids)
    torch.testing.assert_close(weights, 2.5 * chosen)


def test_the_bias_takes_part_in_the_choice() -> None:
    router = Router(torch.eye(3), torch.tensor([0.0, 0.0, 5.0]), Rule("softmax_selected", 1))
    ids, weights = router(torch.tensor([[1.0, 2.0, 0.0]]))
    assert ids.tolist() == [[2]]
    assert weights.tolist() == [[1.0]]
