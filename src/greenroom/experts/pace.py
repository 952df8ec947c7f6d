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

STEPS = 4  # to a factor of two
PIECE = 32 << 20  # bytes of a copy
BUSY = 0.03  # seconds for which the device is kept busy, at least
MOST = 500  # things it is given to do in that time
ROUNDS = 3
LAYERS = 12  # computed for one token, so many at most
READ = 4  # layers whose experts the device reads in turn
TOGETHER = 32  # tokens of the longer measurement
# Seconds, H100 with 16 cores, 26 November 2026: of a call by Python, as it is measured here, and of
# the CPU for a layer's experts, however many they are.
CALL = 30e-6
LEAST = 1e-7  # that anything takes


def rounded(value: float) -> float:
    """The nearest power of two, in quarter steps; of seconds, and at least a tenth of one in a
    million."""
    return float(2 ** (round(STEPS * math.log2(max(LEAST, value))) / STEPS))


def measure(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    """Computes some layers' experts alone and while the device reads others; takes some 300 ms.
    Of several times the shortest counts: what disturbs, passes.

    Args:
        banks: the slabs of each layer, pinned and in one piece.
        used: experts of a token.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    some = banks[:: max(1, len(banks) // LAYERS)]
    reading, copying = Reading(banks[-READ:], used, there.device), Copying(banks[0], there)

    def one() -> float:
        return median(seconds_of(bank, 1, used) for bank in some)

    seconds_of(banks[0], TOGETHER, used)  # buffers grow, threads wake
    found = []
    for _ in range(ROUNDS):
        alone, many = one(), seconds_of(banks[-1], TOGETHER, used)
        reading.begin()
        beside, guests = one(), reading.end()
        copying.begin()
        found.append((alone, many, beside, guests, copying.end() * banks[0].layout.nbytes))
    del reading
    torch.cuda.empty_cache()
    alone, many, beside, guests, copy = (min(times) for times in zip(*found, strict=True))
    return Pace(
        expert=rounded((alone - CALL) / used),
        row=rounded((many - CALL) / (TOGETHER * used)),
        guest=rounded((guests - ARRIVAL) / used),
        copy=rounded(copy),
        slowed=max(1.0, beside / alone),
    )


def seconds_of(bank: CpuExperts, tokens: int, used: int) -> float:
    """Of the CPU for a layer in which each of some tokens uses `used` experts of its own."""
    chance = torch.rand(tokens, bank.experts, generator=torch.Generator().manual_seed(0))
    ids = chance.argsort(1)[:, :used].int()
    hidden, weights = torch.randn(tokens, bank.layout.d), torch.ones(tokens, used)
    begin = time.perf_counter()
    bank(hidden, ids, weights)
    return time.perf_counter() - begin


class Busy:
    """Something the device does over and over for a while; begin it, compute, end it."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._start, self._once, self._last = (event(enable_timing=True) for _ in range(3))
        self._often = 0

    def once(self) -> None:
        """Gives it to the device."""
        raise NotImplementedError

    def begin(self) -> None:
        """Returns while the device is busy."""
        self.once()  # loads what is needed
        self._start.record()
        self.once()
        self._once.record()
        self._once.synchronize()
        alone = max(self._start.elapsed_time(self._once) / 1e3, BUSY / MOST)
        self._often = math.ceil(BUSY / alone)
        for _ in range(self._often):
            self.once()
        self._last.record()

    def end(self) -> float:
        """Seconds that it took once, on average."""
        self._last.synchronize()
        return float(self._once.elapsed_time(self._last)) / 1e3 / self._often


class Reading(Busy):
    """Some experts of a layer, with one token, read from where they lie.

    Args:
        banks: of the layers, which it takes in turn.
        count: experts.
        device: a GPU.
    """

    def __init__(self, banks: Sequence[CpuExperts], count: int, device: torch.device) -> None:
        super().__init__()
        self._layers = len(banks)
        ids = torch.arange(count, dtype=torch.int32, device=device)[None]
        weights = torch.ones(1, count, device=device)

        def work() -> None:
            for bank in banks:
                assert bank.block is not None
                hidden = torch.zeros(1, bank.layout.d, device=device)
                places = torch.arange(bank.experts, dtype=torch.int32, device=device)
                where = torch.from_numpy(bank.block), places, bank.layout
                hits(*where, hidden, ids, weights, bank.activation)

        work()
        torch.cuda.synchronize(device)
        graphs: Any = torch.cuda
        self._graph = graphs.CUDAGraph()
        with graphs.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def once(self) -> None:
        """See `Busy`."""
        self._graph.replay()

    def end(self) -> float:
        """See `Busy`; of one layer."""
        return super().end() / self._layers


class Copying(Busy):
    """Slabs that are copied; `end` gives the seconds of a byte.

    Args:
        bank: the slabs.
        there: (bytes,) uint8 on a GPU.
    """

    def __init__(self, bank: CpuExperts, there: Tensor) -> None:
        super().__init__()
        assert bank.block is not None
        self._piece = torch.from_numpy(bank.block.reshape(-1)[: min(PIECE, len(there))])
        self._there = there[: len(self._piece)]

    def once(self) -> None:
        """See `Busy`."""
        self._there.copy_(self._piece, non_blocking=True)

    def end(self) -> float:
        """See `Busy`; of one byte."""
        return super().end() / len(self._piece)
