"""Routes sorted by expert, against torch's stable sort."""

import pytest
import torch

from greenroom.kernels.sorting import by_expert, by_expert_twin


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (33, 4), (513, 3)])
@pytest.mark.parametrize("experts", [3, 32, 60])
@pytest.mark.parametrize("padded", [False, True])
def test_routes_are_sorted_as_by_torch(tokens, k, experts, padded, device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, experts, (tokens, k), dtype=torch.int32, generator=generator)
    if padded:
        ids[::5] = -1
    found = by_expert(ids.to(device), experts)
    for part, wanted in zip(found, by_expert_twin(ids, experts), strict=True):
        assert torch.equal(part.cpu(), wanted)


def test_an_expert_may_have_everything(device) -> None:
    ids = torch.full((300, 1), 4, dtype=torch.int32, device=device)
    tokens, places, starts = by_expert(ids, 6)
    assert tokens.tolist() == places.tolist() == list(range(300))
    assert starts.tolist() == [0] * 5 + [300] * 2


def test_the_table_of_one_group_is_filled(device) -> None:
    ids = torch.tensor([[0, 2], [2, -1], [2, 4]], dtype=torch.int32, device=device)
    slots = torch.tensor([3, 4, 1, 0, 2], dtype=torch.int32, device=device)
    table = torch.full((4, 5), 9, dtype=torch.int32, device=device)
    starts = by_expert(ids, 5, slots, table)[2]
    assert starts.tolist() == [1, 2, 2, 5, 5, 6]
    assert table.tolist() == [[0, 1, 2, 3, 4], starts.tolist()[:-1], slots.tolist(), [0] * 5]
