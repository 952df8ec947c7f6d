"""Short steps whose experts in RAM are shared by CPU and device, and how many each takes."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom import native
from greenroom.experts import bus as bus_module
from greenroom.experts.beside import ExpertsBeside, WaitingCourier
from greenroom.experts.bus import Bus, LayerBus
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import SHORT_STEP
from greenroom.experts.pace import rounded, seconds_of
from greenroom.experts.quota import ROUTE, Pace, quotas, rows_of
from greenroom.experts.rendezvous import RendezvousCourier
from greenroom.experts.tiers import pin

from .test_rendezvous import DEVICE, EXPERTS, LAYERS, K, bank, step


@pytest.fixture(scope="module")
def pool():
    return native.lib().Pool(2)


@pytest.fixture(scope="module")
def banks(pool) -> list[CpuExperts]:
    return [bank(pool, seed) for seed in range(LAYERS)]


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
        torch.zeros(EXPERTS, dtype=torch.int32, device=DEVICE),
        torch.zeros(room * banks[0].layout.nbytes, dtype=torch.uint8, device=DEVICE),
    )
    bus.quota.copy_(torch.tensor(quota, dtype=torch.int32).expand(SHORT_STEP, -1))
    bus.comes = [any(quota)] * SHORT_STEP
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
    pace = Pace(expert, expert / 3, guest, 1.0, 1.0)
    found = quotas(pace, 32, 4, 0, 1)
    assert found.dtype == np.int32
    assert found[:4].tolist() == wanted


def test_a_cpu_that_is_slowed_by_the_bus_keeps_what_would_gain_too_little() -> None:
    """Of eight small experts a CPU needs 223 us; with one read meanwhile it needs 226."""
    slowed = Pace(25.7e-6, 1e-6, 72.6e-6, 1.0, 1.5)
    assert quotas(slowed, 128, 8, 0, 1)[:8].max() == 0
    free = quotas(replace(slowed, slowed=1.0), 128, 8, 0, 1)
    assert free[:8].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_several_tokens_share_out_what_they_need_and_no_more_than_there_is_room_for() -> None:
    pace = Pace(140e-6, 140e-6 / 3, 1.0, 264e-6, 1.0)
    free, tight = (quotas(pace, 32, 4, room, 32) for room in (32, 5))
    missing = np.arange(1, 33)
    assert (free <= missing).all()
    assert (np.diff(free) >= 0).all()
    rows = rows_of(32, 4, 32)[-1]
    left = np.maximum(pace.expert, rows[: -free[-1]] * pace.row).sum()
    coming = free[-1] * pace.copy + ROUTE * rows[-free[-1] :].sum()
    assert 0.75 < coming / left < 1.25  # busy for as long
    assert tight.max() == 5
    assert (np.minimum(free, 5) == tight).all()


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
    for tokens in (1, 32):
        assert 0 < seconds_of(bank(pool, 0), tokens, K) < 1
