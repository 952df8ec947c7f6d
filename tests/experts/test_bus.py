"""Short steps whose experts in RAM are shared by CPU and device, and how many each takes."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from triton.compiler.errors import CompilationError

from greenroom.errors import NativeError
from greenroom.experts import bus as bus_module
from greenroom.experts import tiers as tiers_module
from greenroom.experts.beside import ExpertsBeside, WaitingCourier
from greenroom.experts.bus import Bus, LayerBus
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import BESIDE_STAGED, SHORT_STEP, rounded
from greenroom.experts.pace import seconds_of
from greenroom.experts.quota import Pace, quotas, rows_of
from greenroom.experts.rendezvous import RendezvousCourier
from greenroom.experts.share import Rates
from greenroom.experts.tiers import Tiers, pin
from greenroom.layers.ledger import Ledger

from .small_banks import DEVICE, EXPERTS, K, step


def plain_hits(pool, banks):
    """`hits` by the CPU, of guests whose slabs must lie where they are said to."""

    def hits(memory, places, layout, hidden, ids, weights, activation, seen, cut):
        here = (ids >= 0) & (places[ids.clamp(min=0).long()] >= 0)
        known = [bank for bank in banks if bank.layout == layout]
        for expert in set(ids[here].tolist()):
            slab = memory[int(places[expert])].numpy()
            known = [bank for bank in known if np.array_equal(bank.slab(expert), slab)]
        assert known
        return known[0](hidden, torch.where(here, ids, -1), weights)

    return hits


def bus_for(banks, quota: list[int], room: int) -> Bus:
    bus = Bus(
        torch.zeros(SHORT_STEP, EXPERTS, dtype=torch.int32, device=DEVICE),
        torch.full((EXPERTS,), -1, dtype=torch.int32, device=DEVICE),
        torch.zeros(room * banks[0].layout.nbytes, dtype=torch.uint8, device=DEVICE),
    )
    bus._found = np.array([quota] * SHORT_STEP, np.int32)
    bus.quota.copy_(torch.from_numpy(bus._found))
    return bus


@pytest.mark.parametrize("quota", [[0, 1, 1, 2, 2], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_with_guests_gives_what_the_cpu_gives(
    pool,
    banks,
    monkeypatch,
    quota,
    tokens,
) -> None:
    if DEVICE.type == "cpu":  # the interpreter takes longer than the CPU's patience lasts
        monkeypatch.setattr(bus_module, "hits", plain_hits(pool, banks))
    waiting = [ExpertsBeside(cpu, WaitingCourier(DEVICE)) for cpu in banks]
    courier = RendezvousCourier(DEVICE)
    meeting = [ExpertsBeside(cpu, courier) for cpu in banks]
    bus = bus_for(banks, quota, EXPERTS)
    for layer in meeting:
        if DEVICE.type == "cuda":
            pin(layer.cpu)
        layer.bus = LayerBus(bus, layer.cpu)
    alone = quota == [1, 2, 3, 4, 5]
    for seed in range(3):
        wanted = step(waiting, tokens, seed)
        plain = step(meeting, tokens, seed)
        with courier.recording(banks), courier.answering(tokens):
            found = step(meeting, tokens, seed)
        assert torch.equal(plain, found)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
        assert (bus.places >= 0).any()  # of the last layer
        nothing = courier._desk._words[: len(banks), 0] < 0
        assert nothing.all() if alone else not nothing.any()


@pytest.mark.parametrize(
    ("guest", "expert", "wanted"),
    [
        (530e-6, 100e-6, [0, 0, 0, 0]),  # one takes the bus longer than four the CPU
        (264e-6, 140e-6, [0, 1, 1, 1]),  # 157; 279 for 297; 297 for 437; 437 for 577 us
        (26e-6, 140e-6, [1, 2, 3, 4]),  # no meeting with the CPU at all
    ],
)
def test_guests_are_as_many_as_shorten_the_layer(guest, expert, wanted) -> None:
    pace = Pace(expert, 0.0, guest, 1.0, 0.0, 1.0)
    found = quotas(pace, 32, 4, 0, 1)
    assert found.dtype == np.int32
    assert found[:4].tolist() == wanted


def test_a_cpu_that_is_slowed_by_the_bus_keeps_what_would_gain_too_little() -> None:
    """Of eight small experts a CPU needs 223 us; with one read meanwhile it needs 226."""
    slowed = Pace(25.7e-6, 0.0, 72.6e-6, 1.0, 0.0, 1.5)
    assert quotas(slowed, 128, 8, 0, 1)[:8].max() == 0
    free = quotas(replace(slowed, slowed=1.0), 128, 8, 0, 1)
    assert free[:8].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_several_tokens_share_out_what_they_need_and_no_more_than_there_is_room_for() -> None:
    pace = Pace(105e-6, 22e-6, 1.0, 244e-6, 5e-6, 1.0)
    free, tight = (quotas(pace, 32, 4, room, 32) for room in (32, 5))
    missing = np.arange(1, 33)
    assert (free <= missing).all()
    assert (np.diff(free) >= 0).all()
    rows = rows_of(32, 4, 32)[-1]
    left = (pace.expert + (rows[: -free[-1]] - 1) * pace.row).sum()
    coming = free[-1] * pace.copy + rows[-free[-1] :].sum() * pace.route
    assert 0.75 < coming / left < 1.25  # busy for as long
    assert tight.max() == 5
    assert (tight <= free).all()


def test_rows_of_experts_are_those_of_uniform_routing() -> None:
    rows = rows_of(32, 4, 32)
    chosen = 32 * (1 - (1 - 4 / 32) ** 32)
    assert rows[31].sum() == pytest.approx(32 * 32 * 4 / chosen, rel=0.03)
    assert (np.diff(rows[31]) >= 0).all()
    assert rows[31][0] == 1
    assert rows[31][-1] >= 8
    assert (rows[4][:5] > 0).all()
    assert (rows[4][5:] == 0).all()
    assert (rows_of(8, 8, 3)[7] == 3).all()
    assert (rows_of(8, 2, 1)[7] == 1).all()


def test_paces_are_rounded_and_measured_on_the_layers(pool) -> None:
    assert rounded(1024.0) == 1024.0
    assert rounded(1100.0) == 1024.0
    assert rounded(1130.0) == pytest.approx(2**10.25)
    assert rounded(0.0) == rounded(1e-7) > 0


def test_the_cpu_is_timed_with_experts_of_every_token() -> None:
    seen = []

    class Bank:
        experts, layout = 7, SimpleNamespace(d=4)

        def __call__(self, hidden, ids, weights) -> None:
            seen.append((tuple(hidden.shape), ids, tuple(weights.shape)))

    for seed in (0, 0, 1):
        assert seconds_of(Bank(), 5, 3, seed) > 0
    shapes = [(hidden, tuple(ids.shape), weights) for hidden, ids, weights in seen]
    assert shapes == [((5, 4), (5, 3), (5, 3))] * 3
    assert all(len(set(row)) == 3 for _, ids, _ in seen for row in ids.tolist())
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1], seen[2][1])


class Pinned:
    """A bank of a layer whose experts may be read by a GPU."""

    def __init__(self, bank: CpuExperts, pinned: bool) -> None:
        self._bank, self.pinned = bank, pinned

    def __getattr__(self, name: str):
        return getattr(self._bank, name)


def staged(banks, used: int, pinned: bool = True) -> Tiers:
    """Tiers with room for two experts."""
    account = Ledger(torch.device("cpu"), 64 << 20)
    slab, layout = banks[0].layout.nbytes, banks[0].layout
    room = 4 * layout.d * layout.f + 2 * slab + BESIDE_STAGED * EXPERTS
    tiers = Tiers(account, 0, room, used=used)
    for cpu in banks:
        tiers.add(ExpertsBeside(Pinned(cpu, pinned), WaitingCourier(torch.device("cpu"))))
    tiers.complete()
    return tiers


FAILURES = [RuntimeError("no memory"), NativeError("a shape"), CompilationError("", None, "a line")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__)
def test_a_measurement_that_fails_leaves_experts_to_the_cpu(
    banks, monkeypatch, caplog, failure
) -> None:
    def measure(*_):
        raise failure

    monkeypatch.setattr(tiers_module, "measure", measure)
    tiers = staged(banks, K)
    tiers.rehearse()
    assert all(layer.bus is None for layer in tiers._layers)
    assert tiers.share.rates is None
    assert "to the CPU" in caplog.text
    assert "bus" not in tiers.report()


@pytest.mark.parametrize(("used", "pinned"), [(0, True), (K, False)])
def test_nothing_is_measured_where_it_cannot_be_used(banks, monkeypatch, used, pinned) -> None:
    monkeypatch.setattr(tiers_module, "measure", None)
    tiers = staged(banks, used, pinned)
    tiers.rehearse()
    assert all(layer.bus is None for layer in tiers._layers)


def test_what_was_measured_is_followed(banks, monkeypatch) -> None:
    pace = Pace(1e-4, 0.0, 1e-5, 1e-5, 0.0, 1.0)
    rates = Rates(1e9, 2e9, 3e9)
    monkeypatch.setattr(tiers_module, "measure", lambda *_: pace)
    monkeypatch.setattr(tiers_module, "measure_rates", lambda *_: rates)
    tiers = staged(banks, K)
    tiers.slots = SimpleNamespace(bus=0.0)
    assert tiers.share.rates is None
    tiers.rehearse()
    assert tiers.slots.bus == rates.bus
    tiers.slots = None
    assert tiers.share.rates == rates
    assert tiers._layers[0].bus.guests(1).quota.tolist() == [1, 2, 2, 2, 2]
    assert tiers._layers[0].bus.guests(3).quota.max() == 2  # there is room for no more
    assert tiers.report()["bus"].startswith("of experts in RAM the GPU reads 2 of 2 over the bus")
