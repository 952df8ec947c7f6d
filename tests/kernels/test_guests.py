"""Who comes over the bus, against the plain twin; guests' slabs are those of their experts."""

import pytest
import torch
from test_experts import bank, routes
from test_rendezvous import make_box, make_state, settle

from greenroom.experts.reference import ReferenceExperts
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import BLOCK, Guests, choose_guests, choose_guests_twin, fetch
from greenroom.kernels.rendezvous import ring, ring_twin

EXPERTS = 9


def guests_of(quota, source, device, fetched: bool, room: int, tokens: int = 4) -> Guests:
    if device.type == "cuda":
        source = source.pin_memory()
    memory = torch.zeros(room, source.shape[1], dtype=torch.uint8, device=device)
    places = torch.full((len(source),), 77, dtype=torch.int32, device=device)
    quota = torch.tensor(quota, dtype=torch.int32, device=device)
    return Guests(quota, places, memory if fetched else source, source, tokens)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "fetched"), [(1, 4, False), (3, 5, True), (19, 2, True), (2, 6, False)]
)
def test_who_comes_is_who_the_twin_says(tokens, k, resident, fetched, device) -> None:
    torch.manual_seed(tokens)
    hidden, weights = torch.randn(tokens, 24, device=device), torch.rand(tokens, k, device=device)
    slots = [-1, 0, -1, -1, -1, 3, -1, -1, 1]
    table = torch.tensor(slots, dtype=torch.int32, device=device) if resident else None
    seen = set()
    for quota in ([0] * 9, [1] * 9, [0, 0, 1, 1, 2, 2, 3, 3, 4], [*range(1, 10)], [50] * 9):
        ids = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(tokens)]).int().to(device)
        ids[1:2, 1:] = -1
        found = []
        for call in (ring, ring_twin):
            source = torch.zeros(EXPERTS, 64, dtype=torch.uint8)
            guests = guests_of(quota, source, device, fetched, EXPERTS, tokens)
            box, state = make_box(24, k, device, 20), make_state(device, 5, 0, 0)
            call(hidden, ids, weights, box, state, table, None, guests)
            settle(device)
            sent = box.ids[:tokens].clone() if int(state[1]) else torch.full((tokens, k), -1)
            used = ids.unique()[ids.unique() >= 0].long()
            places = torch.full_like(guests.places, -1)
            places[used] = torch.where(guests.places[used] == 77, -1, guests.places[used])
            found.append([state.tolist(), int(box.ring[0]), places.tolist(), sent.tolist()])
        assert found[0] == found[1]
        assert (
            choose_guests(ids, table, guests).tolist()
            == choose_guests_twin(ids, table, guests).tolist()
        )
        places, sent = found[0][2:]
        here = {e for e, place in enumerate(places) if place >= 0}
        rest = {e for row in sent for e in row} - {-1}
        absent = {e for e in ids.flatten().tolist() if e >= 0 and not (resident and slots[e] >= 0)}
        assert here | rest == absent
        assert not here & rest
        assert len(here) == min(quota[len(absent) - 1], len(absent))
        uses = torch.bincount(ids[ids >= 0].cpu(), minlength=EXPERTS)
        assert not here or not rest or min(uses[[*here]]) >= max(uses[[*rest]])
        seen.add(len(here))
    assert len(seen) > 2


@pytest.mark.parametrize("fetched", [False, True])
def test_slots_and_guests_together_give_what_they_hold(fetched, device) -> None:
    layout, slabs, floats, _ = bank([12, 12, 14], 256, 256, 5, False)
    plain = ReferenceExperts(*floats)
    hidden, (ids, weights) = torch.randn(4, 256), routes(4, 3, 5)
    ids[2, 1] = -1
    table = torch.tensor([-1, 1, -1, 0, -1], dtype=torch.int32)
    memory = slabs[torch.tensor([3, 1])]
    guests = guests_of([1, 1, 1, 1, 1], slabs, device, fetched, 2)
    guests.places.copy_(torch.tensor([-1, -1, 1 if fetched else 2, -1, -1]))
    fetch(guests)
    there = [t.to(device) for t in (hidden, ids, weights)]
    found = hits(memory.to(device), table.to(device), layout, *there, guests=guests).cpu()
    here = torch.tensor([False, True, True, True, False])
    kept = torch.where((ids >= 0) & here[ids.clamp(min=0).long()], weights, 0.0)
    wanted = plain(hidden, ids.clamp(min=0), kept)
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    without = hits(memory.to(device), table.to(device), layout, *there).cpu()
    assert not torch.allclose(without, found)


@pytest.mark.parametrize("nbytes", [64, 4 * BLOCK, 4 * 40 * BLOCK + 192])
def test_copies_arrive_whole_and_nothing_else_is_written(nbytes, device) -> None:
    source = torch.randint(0, 256, (4, nbytes), dtype=torch.uint8)
    guests = guests_of([0] * 4, source, device, True, 3)
    guests.places.copy_(torch.tensor([-1, 2, -1, 0]))
    guests.memory.fill_(7)
    fetch(guests)
    assert torch.equal(guests.memory[2].cpu(), source[1])
    assert torch.equal(guests.memory[0].cpu(), source[3])
    assert (guests.memory[1] == 7).all()
