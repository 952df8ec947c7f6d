"""Steps that meet the CPU through shared memory against steps in which the host waits. Without a
GPU the kernels run under the interpreter; the native thread that answers is the real one."""

import os
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom.errors import NativeError
from greenroom.experts import rendezvous
from greenroom.experts.beside import ExpertsBeside, WaitingCourier
from greenroom.experts.meter import Meter
from greenroom.experts.rendezvous import Desk, RendezvousCourier, courier_for, trial

from .small_banks import DEVICE, EXPERTS, LAYERS, D, K, bank, routes, step


class Resident:
    """Slots of one layer; what they compute is easy to tell."""

    def __init__(self, *slots: int) -> None:
        self.table = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        self.full = min(slots) >= 0

    def hits(self, hidden, ids, weights, guests=None) -> torch.Tensor:
        here = (ids >= 0) & (self.table[ids.clamp(min=0).long()] >= 0)
        return (hidden * (weights * here).sum(1, keepdim=True)).contiguous()


def courier_that_knows() -> RendezvousCourier:
    courier = RendezvousCourier(DEVICE)
    courier._k = K  # as after a plain step
    return courier


def test_recorded_steps_give_the_bits_of_waiting_ones(banks) -> None:
    slots = [None, Resident(-1, 0, -1, 1, -1), Resident(0, 1, 2, 3, 4)]
    couriers = (WaitingCourier(DEVICE), RendezvousCourier(DEVICE))
    waiting, meeting = (
        [ExpertsBeside(cpu, courier, slot) for cpu, slot in zip(banks, slots, strict=True)]
        for courier in couriers
    )
    assert [layer.waits for layer in waiting] == [True, True, False]
    assert [layer.waits for layer in meeting] == [False] * 3
    courier = couriers[1]
    crossing = [layer.cpu for layer in meeting if layer.crosses]
    assert len(crossing) == 2
    for seed in range(6):
        tokens = 1 + seed % 3
        wanted = step(waiting, tokens, seed)
        assert torch.equal(step(meeting, tokens, seed), wanted)  # plain, as it is outside
        with courier.recording(crossing), courier.answering(tokens):
            found = step(meeting, tokens, seed)
        assert torch.equal(found, wanted)
    stats = courier._desk._native.stats()
    assert stats[0]["calls"] == 6
    assert 0 < stats[1]["calls"] <= 6


def test_meters_hear_of_recorded_steps(pool) -> None:
    banks, courier = [bank(pool, seed) for seed in range(2)], courier_that_knows()
    layers = [ExpertsBeside(cpu, courier) for cpu in banks]
    with courier.recording(banks):
        for metered in (False, True, True):
            for cpu in banks:
                cpu.meter = (cpu.meter or Meter()) if metered else None
            with courier.answering(1):
                step(layers, 1, 0)
    for cpu in banks:
        spent = cpu.meter.short
        assert spent.calls == 2
        assert 0 < spent.seconds < 10
        assert spent.nbytes == 2 * K * cpu.layout.nbytes


class Stuck:
    """A native thread that never answers."""

    def begin(self, number: int, tokens: int) -> None: ...

    def wait(self, seconds: float) -> bool:
        time.sleep(seconds)
        return False

    def cancel(self) -> None: ...


def test_a_stuck_worker_ends_the_step_with_one_line(banks) -> None:
    desk = Desk(DEVICE, banks, 2, K)
    hidden, ids, weights = routes(2, 0)
    answering, desk._native = desk._native, Stuck()
    desk.begin(2)
    begin = time.monotonic()
    with pytest.raises(NativeError, match="did not answer the device within 0 s") as caught:
        desk.finish(0.2)
    assert "\n" not in str(caught.value)
    assert 0.2 < time.monotonic() - begin < 5
    # Whoever comes now on the device learns that the step has failed, and does not wait.
    for layer in range(LAYERS):
        desk.send(layer, hidden, ids, weights, None)
        out = rendezvous.collect(desk.box(layer), 2, desk.state, limit_ms=60_000)
        assert (out == 0).all()
    assert int(desk.state[2]) == 1
    desk._native = answering
    desk.begin(2)
    for layer in range(LAYERS):
        desk.send(layer, hidden, ids, weights, None)
        out = rendezvous.collect(desk.box(layer), 2, desk.state)
        assert torch.equal(out.cpu(), banks[layer](hidden.cpu(), ids.cpu(), weights.cpu()))
    desk.finish()


def test_slow_steps_that_move_on_are_not_given_up(banks) -> None:
    desk = Desk(DEVICE, banks, 1, K)

    class Slow(Stuck):
        calls = 0

        def wait(self, seconds: float) -> bool:
            time.sleep(0.15)
            desk._answers[self.calls] = desk._number
            self.calls += 1
            return self.calls == LAYERS

    desk._native = Slow()
    desk.begin(1)
    desk.finish(0.25)
    assert desk._native.calls == LAYERS


def test_bad_routes_and_steps_that_are_not_run_fail(banks) -> None:
    courier = courier_that_knows()
    layers = [ExpertsBeside(cpu, courier) for cpu in banks]
    hidden, ids, weights = routes(1, 0)
    with courier.recording(banks):
        sent = f"MoE layer 0 was sent expert id {EXPERTS}"
        with pytest.raises(NativeError, match=sent), courier.answering(1):
            layers[0](hidden, ids + EXPERTS - ids[0, 0], weights)
        with pytest.raises(KeyError), courier.answering(1):
            raise KeyError
        with courier.answering(1):
            found = step(layers, 1, 0)
    assert torch.equal(found, step(layers, 1, 0))
    with pytest.raises(NativeError, match="tokens"), courier.answering(1000):
        pass


def test_what_cannot_be_recorded_is_refused(pool, banks) -> None:
    with pytest.raises(NativeError, match="needs all experts in memory"):
        Desk(DEVICE, [bank(pool, 0, lazy=True)], 1, K)
    waiting = WaitingCourier(DEVICE)
    with pytest.raises(NativeError, match="cannot be recorded"), waiting.recording(banks):
        pass
    with waiting.recording([]), waiting.answering(1):
        assert not waiting.records
    assert isinstance(courier_for(DEVICE, lazy=True), WaitingCourier)
    assert courier_for(DEVICE, lazy=False).records == (DEVICE.type == "cuda")


def test_the_trial_finds_a_device_that_sees_stale_memory(banks, monkeypatch) -> None:
    assert trial(DEVICE, banks[0]) == ""
    first: list[torch.Tensor] = []

    def stale(*arguments, **named) -> torch.Tensor:
        first.append(rendezvous_collect(*arguments, **named).clone())
        return first[min(1, len(first) - 1)]

    rendezvous_collect = rendezvous.collect
    monkeypatch.setattr(rendezvous, "collect", stale)
    assert "does not see" in trial(DEVICE, banks[0])
    courier = courier_that_knows()
    assert courier.records
    first.clear()
    for _ in range(2):  # the second is not tried any more
        layer = ExpertsBeside(banks[0], courier)
        if courier.records:
            with pytest.raises(NativeError, match="does not see"), courier.recording(banks):
                pass
        assert layer.waits
    monkeypatch.setattr(rendezvous, "ring", lambda *arguments: None)
    monkeypatch.setattr(rendezvous, "collect", lambda *a, **k: torch.zeros(1, D))
    monkeypatch.setattr(rendezvous, "TRIAL_MS", 100)
    assert "did not answer" in trial(DEVICE, banks[0])
