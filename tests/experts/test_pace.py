"""What is measured when a model is loaded, on a GPU that is played: what it is given to do, and
that nobody goes on reading when something fails."""

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests that come later

from greenroom.experts import pace

from .small_banks import D, F, K, bank

REPLAY = 2e-4  # seconds


class Event:
    """A time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.at - self.at)


class Gpu:
    """What `pace` asks of torch.cuda; a recorded graph takes a while."""

    def __init__(self) -> None:
        self.log: list[str] = []
        graph = SimpleNamespace(replay=lambda: time.sleep(REPLAY))
        self.cuda = SimpleNamespace(
            Event=Event, CUDAGraph=lambda: graph, graph=self.recording, stream=self.on,
            current_stream=lambda device: "usual", empty_cache=lambda: self.log.append("emptied"),
            synchronize=lambda device: self.log.append("waited"),
        )  # fmt: skip

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @contextmanager
    def recording(self, graph, capture_error_mode: str):
        self.log.append("recorded")
        yield

    @contextmanager
    def on(self, stream: str):
        self.log.append(f"on {stream}")
        yield
        self.log.append("off")


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    played = Gpu()
    monkeypatch.setattr(pace, "torch", played)
    monkeypatch.setattr(pace, "BUSY", 2e-3)
    return played


@pytest.fixture(scope="module")
def banks(pool):
    return [bank(pool, seed) for seed in range(5)]


def test_the_device_reads_experts_where_they_lie_and_copies(gpu, banks, monkeypatch) -> None:
    read, copied, routes = [], [], []

    def hits(memory, places, layout, hidden, ids, weights, activation):
        assert (layout.d, layout.f) == (D, F)
        assert hidden.shape == (1, D)
        assert ids.tolist() == [[*range(K)]]
        assert weights.shape == (1, K)
        assert 0 <= places.min() <= places.max() < len(memory)
        read.append(memory.data_ptr())
        routes.append(ids)

    monkeypatch.setattr(pace, "hits", hits)
    monkeypatch.setattr(pace, "fetch", copied.append)
    slab = banks[0].layout.nbytes
    staging = torch.zeros(3 * slab + 64, dtype=torch.uint8)
    found = pace.measure(banks, K, staging)
    in_ram = {bank.block.ctypes.data for bank in banks}
    assert set(read) == in_ram | {staging.data_ptr()}
    assert len({id(ids) for ids in routes}) == 4  # what a recording reads was made within it
    assert copied
    for guests in copied[:1]:
        assert guests.fetched
        assert guests.memory.shape == (3, slab)
        assert guests.places.tolist() == [0, 1, 2, -1, -1]
    each = (found.expert, found.row, found.guest, found.copy, found.route)
    assert all(0 < seconds < 1 for seconds in each)
    assert found.guest < REPLAY / K  # of five layers that a replay reads, and one expert of K
    assert found.slowed >= 1
    assert gpu.log.count("recorded") == 2
    assert gpu.log[-3:] == ["waited", "emptied", "off"]


def test_nothing_is_under_way_after_a_failure(gpu, banks, monkeypatch) -> None:
    def hits(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(pace, "hits", hits)
    with pytest.raises(RuntimeError, match="no such kernel"):
        pace.measure(banks, K, torch.zeros(1 << 20, dtype=torch.uint8))
    assert gpu.log == ["on usual", "waited", "emptied"]


def test_what_the_cpu_takes_of_long_steps_is_measured_beside_copies(gpu, banks) -> None:
    slab, cpu = banks[0].layout.nbytes, banks[0]
    staging = torch.zeros(3 * slab + 64, dtype=torch.uint8)
    begin = time.perf_counter()
    rates = pace.measure_rates(cpu, staging)
    seconds = time.perf_counter() - begin
    assert staging[: 3 * slab].numpy().tobytes() == cpu.block[-3:].tobytes()
    assert not staging[3 * slab :].any()
    lent = min(pace.ERRAND, cpu.experts)
    assert min(rates.bus * seconds / slab, rates.reading * seconds / slab) > 1
    assert rates.operations * seconds > 2 * lent * (pace.MANY - pace.FEW) * 3 * D * F
    few, many = (rates.computing(rows, slab, 3 * D * F) for rows in (pace.FEW, pace.MANY))
    assert few == slab / rates.reading
    assert rates.reading_fewest * seconds / slab > 1
    assert many - few == pytest.approx((pace.MANY - pace.FEW) * 6 * D * F / rates.operations)


def test_tokens_are_not_free_because_a_measurement_was_disturbed(gpu, banks, monkeypatch) -> None:
    monkeypatch.setattr(pace, "lent_seconds", lambda bank, lent, rows: 2e-3 if rows < 20 else 1e-3)
    rates = pace.measure_rates(banks[0], torch.zeros(1 << 20, dtype=torch.uint8))
    slab, weights = banks[0].layout.nbytes, 3 * D * F
    lent = min(pace.ERRAND, banks[0].experts)
    more = rates.computing(pace.MANY, slab, weights) - rates.computing(pace.FEW, slab, weights)
    assert lent * more == pytest.approx(1e-3 / 8, rel=0.1)


def test_rates_of_failed_copies_are_not_believed(gpu, banks, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("no copy")

    monkeypatch.setattr(pace, "Busy", broken)
    with pytest.raises(RuntimeError, match="no copy"):
        pace.measure_rates(banks[0], torch.zeros(1 << 20, dtype=torch.uint8))
    assert gpu.log == ["on usual", "waited", "emptied"]
