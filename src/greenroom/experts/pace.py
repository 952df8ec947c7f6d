"""How fast bus and CPU are when both are busy with a model's experts, measured when it is loaded.

The figures are rounded, so that another run seldom shares experts out in another way: their sums
differ in the last digits with the processor that forms them.
"""

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.quota import ARRIVAL, Pace
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests, fetch

STEPS = 4  # to a factor of two
BUSY = 0.02  # seconds for which the device is kept busy, at least
MOST = 1000  # things it is given to do in that time
COPIES = 8  # experts copied together
ROUNDS = 3
LAYERS = 12  # computed for one token, so many at most
READ = 4  # layers whose experts the device reads in turn
TOGETHER = 32  # tokens of the longer measurement
# Seconds, H100 with 16 cores, 26 November 2026: of a call by Python, as it is measured here, and of
# the CPU for a layer's experts, however many they are.
CALL = 30e-6
LEAST = 1e-7  # that anything takes


def rounded(value: float) -> float:
    """The nearest power of two, in quarter steps, and no less than `LEAST`."""
    return float(2 ** (round(STEPS * math.log2(max(LEAST, value))) / STEPS))


def measure(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    """Computes some layers' experts alone and while the device reads others; takes some 400 ms.
    Of several times the shortest counts: what disturbs, passes.

    Args:
        banks: the slabs of each layer, pinned and in one piece.
        used: experts of a token.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    device = there.device
    with torch.cuda.stream(torch.cuda.current_stream(device)):  # a failed recording leaves another
        try:
            return _measured(banks, used, there)
        finally:  # nobody may go on reading memory that is given back
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def _measured(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    some, read = (banks[:: max(1, len(banks) // most)] for most in (LAYERS, READ))
    reading, copied = (
        Reading(read, used, there.device),
        Reading(read[:1], used, there.device, there),
    )
    fetching = Fetching(read[0], there)
    seconds_of(banks[0], TOGETHER, used)  # buffers grow, threads wake
    found = []
    for turn in range(ROUNDS):
        ones = [seconds_of(bank, 1, used, turn) for bank in some]
        many = seconds_of(banks[-1], TOGETHER, used, turn)
        reading.begin(2 * sum(ones))
        beside = median(seconds_of(bank, 1, used, turn + ROUNDS) for bank in some)
        guests = reading.end()
        fetching.begin(2 * many)
        seconds_of(banks[-1], TOGETHER, used, turn)
        copy = fetching.end() * banks[0].layout.nbytes
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


def seconds_of(bank: CpuExperts, tokens: int, used: int, seed: int = 0) -> float:
    """Of the CPU for a layer in which each of some tokens uses `used` experts of its own."""
    chance = torch.rand(tokens, bank.experts, generator=torch.Generator().manual_seed(seed))
    ids = chance.argsort(1)[:, :used].int()
    hidden, weights = torch.randn(tokens, bank.layout.d), torch.ones(tokens, used)
    begin = time.perf_counter()
    bank(hidden, ids, weights)
    return time.perf_counter() - begin


class Busy:
    """Something the device does over and over for a while; begin it, compute, end it."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._first, self._second, self._last = (event(enable_timing=True) for _ in range(3))
        self._often = 0

    def give(self) -> None:
        """Has the device do it once."""
        raise NotImplementedError

    def begin(self, seconds: float) -> None:
        """Returns while the device is busy, for at least so many seconds more."""
        self.give()  # loads what is needed
        self._first.record()
        self.give()
        self._second.record()
        self._second.synchronize()
        wanted = max(BUSY, seconds)
        alone = max(self._first.elapsed_time(self._second) / 1e3, wanted / MOST)
        self._often = math.ceil(wanted / alone)
        for _ in range(self._often):
            self.give()
        self._last.record()

    def end(self) -> float:
        """Seconds that it took once, on average."""
        self._last.synchronize()
        return float(self._second.elapsed_time(self._last)) / 1e3 / self._often


class Reading(Busy):
    """Some experts of a layer, with one token, read from where they lie.

    Args:
        banks: of the layers, which it takes in turn.
        count: experts.
        device: a GPU.
        copies: (bytes,) uint8 there, to be read instead of what is in RAM.
    """

    def __init__(
        self,
        banks: Sequence[CpuExperts],
        count: int,
        device: torch.device,
        copies: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._layers = len(banks)
        ids = torch.arange(count, dtype=torch.int32, device=device)[None]
        weights = torch.ones(1, count, device=device)

        def work() -> None:
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
        self._graph = graphs.CUDAGraph()
        with graphs.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def give(self) -> None:
        """See `Busy`."""
        self._graph.replay()

    def end(self) -> float:
        """See `Busy`; of one layer."""
        return super().end() / self._layers


class Fetching(Busy):
    """Slabs that are copied as short steps copy them; `end` gives the seconds of a byte.

    Args:
        bank: the slabs.
        there: (bytes,) uint8 on a GPU.
    """

    def __init__(self, bank: CpuExperts, there: Tensor) -> None:
        super().__init__()
        assert bank.block is not None
        memory = slabs_in(there, bank.layout.nbytes)[: min(COPIES, bank.experts)]
        places = torch.arange(bank.experts, dtype=torch.int32, device=there.device)
        places[len(memory) :] = -1
        source = torch.from_numpy(bank.block)
        self._guests = Guests(places, places, memory, source, tokens=len(memory))

    def give(self) -> None:
        """See `Busy`."""
        fetch(self._guests)

    def end(self) -> float:
        """See `Busy`; of one byte."""
        return super().end() / self._guests.memory.numel()


def slabs_in(memory: Tensor, nbytes: int) -> Tensor:
    """(slabs, nbytes): as many as the bytes of `memory` hold."""
    count = len(memory) // nbytes
    return memory[: count * nbytes].view(count, nbytes)
