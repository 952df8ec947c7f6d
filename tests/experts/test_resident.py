"""Long steps of layers whose experts all have slots, against the plain experts."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from test_experts import bank, routes

from greenroom.experts import limits, resident
from greenroom.experts.reference import ReferenceExperts
from greenroom.experts.resident import ResidentMlp
from greenroom.experts.stream import GroupMlp, Step
from greenroom.kernels import grouped
from greenroom.kernels.expert_rows import scaled_rows
from greenroom.kernels.grouped import Group, Routes
from greenroom.placement import predict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Gate and up as one matrix, and apart, since they have two types.
@pytest.mark.parametrize(
    ("kinds", "d", "f", "biased", "activation"),
    [
        ([39, 39, 39], 96, 64, True, "gpt-oss"),
        ([12, 14, 12], 256, 256, False, "silu"),
        ([8, 8, 8], 64, 96, True, "silu"),
    ],
)
@pytest.mark.parametrize("chunk", [0, 60])
def test_resident_experts_equal_the_plain_ones(
    kinds, d, f, biased, activation, chunk, monkeypatch
) -> None:
    layout, slabs, floats, biases = bank(kinds, d, f, 5, biased)
    plain = ReferenceExperts(*floats, tuple(biases) if biased else None, activation)
    order = torch.tensor([3, 0, 4, 1, 2])
    table = torch.argsort(order).int().to(DEVICE)
    hidden = torch.randn(35, d, generator=torch.Generator().manual_seed(1)) / 8
    ids, weights = routes(35, 2, 5)
    passes = []
    monkeypatch.setattr(
        resident, "add_rows", lambda *a, add=resident.add_rows: passes.append(a[-1]) or add(*a)
    )
    mlp = ResidentMlp(layout, activation, 5, chunk)
    arguments = (t.to(DEVICE) for t in (hidden, ids, weights))
    found, starts = mlp(slabs[order].to(DEVICE), table, *arguments)
    wanted = plain(hidden, ids, weights)
    scale = wanted.abs().max()
    torch.testing.assert_close(found.cpu() / scale, wanted / scale, atol=2e-3, rtol=2e-3)
    assert np.diff(starts.cpu()).tolist() == torch.bincount(ids.view(-1), minlength=5).tolist()
    assert passes == ([0, 60] if chunk else [0, 35])  # no more rows at a time than are planned


@pytest.mark.parametrize(("few", "room"), [(0, 5), (0, 1), (resident.FEW_ROWS, 1)])
def test_groups_of_more_experts_than_there_is_room_for_are_not_expanded(
    few, room, monkeypatch
) -> None:
    monkeypatch.setattr(resident, "FEW_ROWS", few)
    layout, slabs, floats, _ = bank([8, 8, 8], 64, 96, 5, False)
    hidden = torch.randn(35, 64, generator=torch.Generator().manual_seed(1)) / 8
    ids, weights = routes(35, 2, 5)
    scratch = torch.empty(room * 2 * 64 * 96, dtype=torch.float16, device=DEVICE)
    mlp = GroupMlp(layout, "silu", scratch)
    here = (t.to(DEVICE) for t in (ids, weights, torch.arange(5, dtype=torch.int32)))
    rows = hidden.to(DEVICE)
    step = Step(Routes.all_in(*here), *scaled_rows(rows), torch.zeros_like(rows), 35)
    counts = tuple(torch.bincount(ids.view(-1), minlength=5).tolist())
    mlp(step, Group(0, 0, counts), slabs.to(DEVICE))
    wanted = ReferenceExperts(*floats, None, "silu")(hidden, ids, weights)
    scale = wanted.abs().max()
    torch.testing.assert_close(step.out.cpu() / scale, wanted / scale, atol=2e-3, rtol=2e-3)


def test_packed_experts_of_few_rows_are_multiplied_from_their_blocks() -> None:
    floats, packed = (bank([kind] * 3, 32, 32, 1, False)[0] for kind in (30, 8))
    assert not ResidentMlp(floats, "silu", 3, 0).takes(1)
    assert ResidentMlp(packed, "silu", 3, 0).takes(3 * resident.FEW_ROWS)
    assert not ResidentMlp(packed, "silu", 3, 0).takes(3 * resident.FEW_ROWS + 1)


def test_predictions_know_how_many_rows_and_experts_are_computed_how() -> None:
    assert predict.FEW_ROWS == resident.FEW_ROWS
    assert limits.PAGE_EXPERTS == grouped.MOST
