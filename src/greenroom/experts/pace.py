"""How fast CPU and bus are with a model's experts, each with the other busy and the CPU also alone,
measured when it is loaded.

The figures are rounded, so that another run seldom shares experts out in another way: their sums
differ in the last digits with the processor that forms them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import LEAST, rounded
from greenroom.experts.quota import ARRIVAL, Pace
from greenroom.experts.share import FEW, FEWEST, Rates
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests, fetch

BUSY = 0.02  # seconds for which the device is kept busy, at least
MOST = 1000  # things it is given to do in that time
COPIES = 8  # experts copied together
ROUNDS = 3
RATE_ROUNDS = 5  # of `measure_rates`
LAYERS = 12  # computed for one token, so many at most
READ = 4  # layers whose experts the device reads in turn
TOGETHER = 32  # tokens of the longer measurement
ERRAND = 8  # experts that the CPU computes at a time in long steps, about
MANY = 64  # and rows of each, or `FEW`
FINE = 8  # steps to a factor of two of what long steps are shared by, which much depends on
WORK = 26e9  # operations that are measured at a time: fewer experts, if they are large
# Seconds, H100 with 16 cores, 26 November 2026: of a call by Python, as it is measured here, and of
# the CPU for a layer's experts, however many they are.
CALL = 30e-6


def measure(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    """Computes some layers' experts alone and while the device reads others; takes some 400 ms.
    Of several times the shortest counts: what disturbs, passes.

    Args:
        banks: the slabs of each layer, pinned and in one piece.
        used: experts of a token.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    with _left_idle(there.device):
        return _measured(banks, used, there)


@contextmanager
def _left_idle(device: torch.device) -> Iterator[None]:
    """Whatever fails within, nobody goes on reading memory that is given back after it."""
    with torch.cuda.stream(torch.cuda.current_stream(device)):  # a failed recording leaves another
        try:
            yield
        finally:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def _measured(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    some, read = (banks[:: max(1, len(banks) // most)] for most in (LAYERS, READ))
    in_ram, copied = reading(read, used, there.device), reading(read[:1], used, there.device, there)
    copying = fetching(read[0], there)
    seconds_of(banks[0], TOGETHER, used)  # buffers grow, threads wake
    found = []
    for turn in range(ROUNDS):
        ones = [seconds_of(bank, 1, used, turn) for bank in some]
        many = seconds_of(banks[-1], TOGETHER, used, turn)
        in_ram.begin(2 * sum(ones))
        beside = median(seconds_of(bank, 1, used, turn + ROUNDS) for bank in some)
        guests = in_ram.end()
        copying.begin(2 * many)
        seconds_of(banks[-1], TOGETHER, used, turn)
        copy = copying.end()
        copied.begin(0.0)
        found.append((median(ones), many, beside, guests, copy, copied.end()))
    one, many, beside, guests, copy, routes = (min(times) for times in zip(*found, strict=True))
    expert = max(LEAST, (one - CALL) / used)
    experts = banks[-1].experts
    touched = experts * (1 - (1 - used / experts) ** TOGETHER)
    further = TOGETHER * used - touched
    return Pace(
        expert=rounded(expert),
        row=rounded((many - CALL - touched * expert) / max(1.0, further)),
        guest=rounded((guests - ARRIVAL) / used),
        copy=rounded(copy),
        route=rounded((routes - ARRIVAL) / used),
        slowed=max(1.0, rounded(beside / one)),
    )


def measure_rates(bank: CpuExperts, there: Tensor) -> Rates:
    """Computes some experts of many rows while the device copies others, see `measure`; takes some
    150 ms. Few rows tell how fast weights are read, more of them how fast they are multiplied. The
    median counts: what disturbs a CPU now will do so later, and a layer waits for it.

    Args:
        bank: the slabs of a layer, pinned and in one piece.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    assert bank.block is not None
    slab, weights = bank.layout.nbytes, 3 * bank.layout.d * bank.layout.f
    lent = max(1, min(ERRAND, bank.experts, int(WORK / (2 * MANY * weights))))
    pages, source = slabs_in(there, slab), torch.from_numpy(bank.block)
    count = min(ERRAND, len(pages), bank.experts)
    with _left_idle(there.device):
        copying = Busy(lambda: pages[:count].copy_(source[-count:], non_blocking=True), count)
        alone = sum(lent_seconds(bank, lent, rows) for rows in (MANY, FEW, FEWEST))
        found = []
        for _ in range(RATE_ROUNDS):
            copying.begin(2 * alone)
            times = [lent_seconds(bank, lent, rows) for rows in (FEWEST, FEW, MANY)]
            found.append((*times, copying.end()))
    fewest, few, many, copy = (median(times) for times in zip(*found, strict=True))
    operations = 2 * lent * (MANY - FEW) * weights / max(many - few, many / 8, LEAST)
    rates = slab / copy, lent * slab / few, operations, lent * slab / fewest
    return Rates(*(rounded(rate, FINE) for rate in rates))


def seconds_of(bank: CpuExperts, tokens: int, used: int, seed: int = 0) -> float:
    """Of the CPU for a layer in which each of some tokens uses `used` experts of its own."""
    chance = torch.rand(tokens, bank.experts, generator=torch.Generator().manual_seed(seed))
    return _seconds(bank, chance.argsort(1)[:, :used].int())


def lent_seconds(bank: CpuExperts, experts: int, rows: int) -> float:
    """Of the CPU for so many rows of each of the first experts."""
    return _seconds(bank, torch.arange(experts, dtype=torch.int32).repeat_interleave(rows)[:, None])


def _seconds(bank: CpuExperts, ids: Tensor) -> float:
    hidden, weights = torch.randn(len(ids), bank.layout.d), torch.ones(ids.shape)
    begin = time.perf_counter()
    bank(hidden, ids, weights)
    return time.perf_counter() - begin


class Busy:
    """Something the device does over and over for a while; begin it, compute, end it.

    Args:
        give: has the device do it once.
        parts: of which `end` gives the seconds of one.
    """

    def __init__(self, give: Callable[[], object], parts: int) -> None:
        event: Any = torch.cuda.Event
        self._first, self._second, self._last = (event(enable_timing=True) for _ in range(3))
        self._give, self._parts, self._often = give, parts, 0

    def begin(self, seconds: float) -> None:
        """Returns while the device is busy, for at least so many seconds more."""
        self._give()  # loads what is needed
        self._first.record()
        self._give()
        self._second.record()
        self._second.synchronize()
        wanted = max(BUSY, seconds)
        alone = max(self._first.elapsed_time(self._second) / 1e3, wanted / MOST)
        self._often = math.ceil(wanted / alone)
        for _ in range(self._often):
            self._give()
        self._last.record()

    def end(self) -> float:
        """Seconds of a part, on average."""
        self._last.synchronize()
        seconds = float(self._second.elapsed_time(self._last)) / 1e3
        return seconds / self._often / self._parts


def reading(
    banks: Sequence[CpuExperts], count: int, device: torch.device, copies: Tensor | None = None
) -> Busy:
    """Some experts of a layer, with one token, read from where they lie; a part is a layer.

    Args:
        banks: of the layers, which it takes in turn.
        count: experts.
        device: a GPU.
        copies: (bytes,) uint8 there, to be read instead of what is in RAM.
    """

    def work() -> None:  # all that it makes belongs to the graph, and lasts as long
        ids = torch.arange(count, dtype=torch.int32, device=device)[None]
        weights = torch.ones(1, count, device=device)
        for bank in banks:
            assert bank.block is not None
            hidden = torch.zeros(1, bank.layout.d, device=device)
            places = torch.arange(bank.experts, dtype=torch.int32, device=device)
            memory = torch.from_numpy(bank.block)
            if copies is not None:
                memory = slabs_in(copies, bank.layout.nbytes)
                places %= len(memory)
            hits(memory, places, bank.layout, hidden, ids, weights, bank.activation)

    work()
    torch.cuda.synchronize(device)
    graphs: Any = torch.cuda
    graph = graphs.CUDAGraph()
    with graphs.graph(graph, capture_error_mode="thread_local"):
        work()
    return Busy(graph.replay, len(banks))


def fetching(bank: CpuExperts, there: Tensor) -> Busy:
    """Slabs that are copied as short steps copy them; a part is a slab.

    Args:
        bank: the slabs.
        there: (bytes,) uint8 on a GPU.
    """
    assert bank.block is not None
    memory = slabs_in(there, bank.layout.nbytes)[: min(COPIES, bank.experts)]
    places = torch.arange(bank.experts, dtype=torch.int32, device=there.device)
    places[len(memory) :] = -1
    guests = Guests(places, places, memory, torch.from_numpy(bank.block), tokens=len(memory))
    return Busy(lambda: fetch(guests), len(memory))


def slabs_in(memory: Tensor, nbytes: int) -> Tensor:
    """(slabs, nbytes): as many as the bytes of `memory` hold."""
    count = len(memory) // nbytes
    return memory[: count * nbytes].view(count, nbytes)
