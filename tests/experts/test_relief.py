"""Memory that is missing: slots and staging slabs go, answers stay."""

import os

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.experts.residency import EMPTY, Move, Residency
from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, load_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), path)
    options = LoadOptions(
        backend="cuda", device=DEVICE, pool=native.lib().Pool(1), slot_bytes=2 << 20,
        staging_bytes=2 << 20, scratch_bytes=1 << 20,
    )  # fmt: skip
    with GGUFFile(path) as file:
        yield load_model(file, options)


def test_slots_go_by_halves_then_staging_then_nothing(model) -> None:
    backend, tiers = model.backend, model.backend.tiers
    arena, ledger = tiers.slots.arenas[0], model.backend.bench.ledger
    slab = arena.memory.shape[1]
    while (count := len(arena.memory)) > 1:
        booked = ledger.used
        assert backend.relieve() == (count - count // 2) * slab
        assert ledger.used == booked - (count - count // 2) * slab
        assert ledger.parts["slots"] >= arena.memory.nbytes
        held = tiers.slots.seats[tiers.slots.seats != EMPTY]
        assert sorted(held) == list(range(count // 2))
        assert torch.equal(tiers.slots.table.cpu(), torch.from_numpy(tiers.slots.seats))
        for layer, bank in zip(tiers.slots.layers, arena.banks, strict=True):
            assert layer.memory is arena.memory
            for expert, slot in layer.places().items():
                assert np.array_equal(arena.memory[slot].cpu().numpy(), bank.slab(expert))
    staged = ledger.parts["staging"]
    assert staged > 0
    assert backend.relieve() == staged
    assert ledger.parts["staging"] == 0
    assert all(layer.stream is None for layer in tiers._layers)
    assert backend.relieve() == 0


def test_long_steps_are_the_cpus_when_staging_has_gone(model, monkeypatch) -> None:
    """Nothing is planned for what the slots' kernels would need for many tokens."""
    while model.relieve():
        pass
    bank, seen = model.blk[0].ffn.experts, []
    kind = type(bank.slots)
    real = kind.hits

    def noted(self, hidden, ids, weights, guests=None):
        seen.append(len(hidden))
        return real(self, hidden, ids, weights, guests)

    monkeypatch.setattr(kind, "hits", noted)
    assert bank.slots.places()  # a slot is left
    generator = torch.Generator().manual_seed(1)
    for tokens in (40, 2):
        hidden = torch.randn(tokens, bank.cpu.layout.d, generator=generator)
        ids = torch.randint(0, bank.cpu.experts, (tokens, 4), generator=generator).int()
        weights = torch.rand(tokens, 4, generator=generator)
        found = bank(*(part.to(DEVICE) for part in (hidden, ids, weights))).cpu()
        wanted = bank.cpu(hidden, ids, weights)
        assert float((found - wanted).norm() / wanted.norm()) < (1e-3 if seen else 1e-9)
    assert seen == [2]


def test_where_even_fewer_slots_find_no_memory_none_stay(model, monkeypatch) -> None:
    tiers, ledger = model.backend.tiers, model.backend.bench.ledger
    arena = tiers.slots.arenas[0]
    nbytes, others = arena.memory.nbytes, ledger.used - arena.memory.nbytes
    real, device = torch.empty, torch.device(DEVICE)

    def failing(*shape, **options):
        if (
            shape
            and options.get("device") == device
            and shape[0] == len(arena.residency._holder) // 2
        ):
            raise torch.OutOfMemoryError("taken")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", failing)
    assert tiers.slots.shrink() == nbytes
    assert ledger.used == others
    assert (tiers.slots.seats == EMPTY).all()
    assert tiers.slots.shrink() == 0


def test_a_full_layer_is_full_no_more(model) -> None:
    slots, banks = model.backend.tiers.slots, [blk.ffn.experts for blk in model.blk]
    assert [bank.crosses for bank in banks] == [not layer.full for layer in slots.layers]
    model.relieve()
    assert not any(layer.full for layer in slots.layers)
    assert all(bank.crosses for bank in banks)
    # Where a recorded step meets the CPU, the host has not to wait for it.
    assert model.waits == (not model.backend._courier.records)


def test_residency_keeps_the_first_slots() -> None:
    table = Residency(2, 4, 5)
    for slot, place in enumerate([(0, 1), (1, 2), (0, 3), (1, 0), (0, 0)]):
        table.apply(Move(*place, slot))
    table.shrink(2)
    assert table.held == [Move(0, 1, 0), Move(1, 2, 1)]
    assert table.slots == table.resident == 2
    assert (table.slot_of != EMPTY).sum() == 2
