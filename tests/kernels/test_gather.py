"""Embedding rows decoded by the device are the host's, bit by bit."""

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.gather import KINDS
from greenroom.layers.device_embedding import DeviceEmbedding
from greenroom.layers.weight import Weight

VOCABULARY, WIDTH = 23, 768


def table(kind: int, device: torch.device, copy: bool = True) -> DeviceEmbedding:
    type, rng = GGMLType(kind), np.random.default_rng(kind)
    raw = random_blocks(type, VOCABULARY, WIDTH, rng).reshape(VOCABULARY, -1)
    return DeviceEmbedding(
        Weight("token_embd.weight", type, raw), device, native.lib().Pool(1) if copy else None
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_are_those_of_the_host(kind: int, device: torch.device) -> None:
    found = table(kind, device)
    assert found.reads
    tokens = torch.tensor([7, 0, VOCABULARY - 1, 7])
    rows = found(tokens)
    assert rows.device.type == device.type
    assert torch.equal(rows.cpu().view(torch.int32), found.rows(tokens).view(torch.int32))


def test_negative_ids_are_what_was_chosen_on_the_device(device: torch.device) -> None:
    found = table(GGMLType.Q8_0, device)
    ids, chosen = torch.tensor([3, -1, -1, 5]), torch.tensor([9, 8, -1, 2**40])
    rows = found.gather(ids.to(device), chosen.to(device)).cpu()
    wanted = found.rows(torch.tensor([3, 8, 5]))
    assert torch.equal(rows[[0, 1, 3]], wanted)
    assert torch.isfinite(rows[2]).all()  # nothing was chosen: some row, and no fault


@pytest.mark.parametrize(("kind", "copy"), [(GGMLType.MXFP4, True), (GGMLType.Q8_0, False)])
def test_other_tables_are_left_to_the_host(
    kind: GGMLType, copy: bool, device: torch.device
) -> None:
    found = table(kind, device, copy)
    assert not found.reads
    tokens = torch.tensor([4, 1])
    assert torch.equal(found(tokens).cpu(), found.rows(tokens))
