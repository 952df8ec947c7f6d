"""Layers of two slab layouts share what is promoted: those go first that gain most per byte."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests that come later

from greenroom.experts import slots as module
from greenroom.experts.slots import Slots
from greenroom.layers.ledger import Ledger

from .late_experts import SLABS, Bank

LAYERS, EXPERTS, LIMIT = 4, 8, 4
KINDS = 1, 1, 0, 0  # large slabs first


@pytest.fixture
def slots() -> Slots:
    """Half of each layout's experts sit in VRAM: those of the lowest numbers."""
    banks = [Bank(kind, EXPERTS, number) for number, kind in enumerate(KINDS)]
    need = sum(SLABS[kind] for kind in KINDS) * EXPERTS
    found = Slots(Ledger(torch.device("cpu")), banks, need // 2 + (1 << 14))
    assert [len(arena.memory) for arena in found.arenas] == [EXPERTS, EXPERTS]
    assert (found.resident == EXPERTS // 2).all()
    return found


def routed(**heat: float) -> np.ndarray:
    """(layers, experts) of one step: experts without a slot, by layout."""
    uses = np.zeros((LAYERS, EXPERTS), np.int64)
    uses[:2, EXPERTS // 2 :] = heat["large"]
    uses[2:, EXPERTS // 2 :] = heat["small"]
    return uses


def entered(slots: Slots) -> tuple[int, int]:
    """Newcomers with large slabs and with small ones."""
    slots.advance(0)
    found = (slots.seats[:, EXPERTS // 2 :] >= 0).sum(1)
    return int(found[:2].sum()), int(found[2:].sum())


def test_no_layout_waits_until_another_has_had_its_fill(slots: Slots) -> None:
    slots.observe(routed(large=3, small=90))
    slots.advance(LIMIT)
    assert entered(slots) == (0, 4)
    slots.advance(LIMIT)
    assert entered(slots) == (0, 8)
    slots.advance(LIMIT)
    assert entered(slots) == (4, 8)


@pytest.mark.parametrize(("large", "newcomers"), [(14, (0, 4)), (16, (4, 0))])
def test_a_byte_counts_alike_in_both(slots: Slots, large: int, newcomers: tuple[int, int]) -> None:
    """A large slab has half as many bytes again as a small one, of 10 routes."""
    slots.observe(routed(large=large, small=10))
    slots.advance(LIMIT)
    assert entered(slots) == newcomers


@pytest.mark.parametrize(("large", "newcomers"), [(1400, (0, 3)), (1600, (2, 0))])
def test_so_it_does_after_a_long_step(
    slots: Slots, large: int, newcomers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two large slabs or three small ones."""
    monkeypatch.setattr(module, "BURST", 1.0)
    monkeypatch.setattr(module, "BURST_BYTES", 3 * SLABS[0])
    for layer, row in enumerate(routed(large=large, small=1000).tolist()):
        slots.log.add(layer, row)
    slots.bus = 1e12
    slots.step_done(64)
    slots.step_done(1, 1.0)
    assert entered(slots) == newcomers
