"""How fast bus and CPU are when both are busy with a model's experts, measured when it is loaded.

The figures are rounded, so that another run seldom shares experts out in another way: their sums
differ in the last digits with the processor that forms them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.kernels.experts import hits

STEPS = 4  # to a factor of two
PIECE = 32 << 20  # bytes of a copy
BUSY = 0.04  # seconds for which the device is kept busy, at least
MOST = 500  # things it is given to do in that time
LAYERS = 12  # computed for one token, so many at most
READ = 4  # layers whose experts the device reads in turn
TOGETHER = 32  # tokens of the longer measurement


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that the experts of a layer take in a short step.

    Attributes:
        meeting: of the CPU, however many it computes.
        expert: of the CPU besides, for each with one token.
        row: of the CPU for each of an expert's tokens where there are many.
        arrival: of the device, however many it reads where they lie.
        guest: of the device besides, for each of these.
        copy: of the bus for each that is copied.
    """

    meeting: float
    expert: float
    row: float
    arrival: float
    guest: float
    copy: float

    def computing(self, rows: float) -> float:
        """Of the CPU for an expert with so many tokens."""
        return max(self.expert, rows * self.row)


def rounded(value: float) -> float:
    """The nearest power of two, in quarter steps."""
    return float(2 ** (round(STEPS * math.log2(value)) / STEPS))


def measure(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    """Computes some layers' experts while the device reads others; takes some 200 ms.

    Args:
        banks: the slabs of each layer, pinned and in one piece.
        used: experts of a token.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    few = max(1, used // 2)
    cpu, gpu = [], []
    for count in (few, used):
        reading = Reading(banks, count, there.device)
        reading.begin()
        cpu.append(computing(banks, count))
        gpu.append(reading.end())
    torch.cuda.empty_cache()
    copying = Copying(banks[0], there)
    copying.begin()
    row = seconds_of(banks[-1], TOGETHER, used) / (TOGETHER * used)
    copy = copying.end() * banks[0].layout.nbytes
    found = *line(few, used, *cpu), row, *line(few, used, *gpu), copy
    return Pace(*(rounded(seconds) for seconds in found))


def line(few: int, many: int, first: float, second: float) -> tuple[float, float]:
    """Start and slope of the line through (few, first) and (many, second), neither below a
    microsecond nor the slope below half of what it is from the origin."""
    each = second / many
    slope = max(each / 2, (second - first) / (many - few)) if many > few else each
    slope = min(slope, each)
    return max(1e-6, second - many * slope), max(1e-6, slope)


def computing(banks: Sequence[CpuExperts], count: int) -> float:
    """Seconds of the CPU for so many experts of a layer with one token."""
    seconds_of(banks[0], 1, count)  # buffers grow, threads wake
    some = banks[:: max(1, len(banks) // LAYERS)]
    return median(seconds_of(bank, 1, count) for bank in some)


def seconds_of(bank: CpuExperts, tokens: int, used: int) -> float:
    """Of a call in which every token uses `used` experts, others than those before it."""
    hidden = torch.zeros(tokens, bank.layout.d)
    ids = torch.arange(tokens * used, dtype=torch.int32).view(tokens, used) % bank.experts
    begin = time.perf_counter()
    bank(hidden, ids, torch.ones(tokens, used))
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
        banks: of the layers; the device takes them in turn.
        count: experts.
        device: a GPU.
    """

    def __init__(self, banks: Sequence[CpuExperts], count: int, device: torch.device) -> None:
        super().__init__()
        self._count, self._layers = count, min(READ, len(banks))
        ids = torch.arange(count, dtype=torch.int32, device=device)[None]
        weights = torch.ones(1, count, device=device)

        def work() -> None:
            for bank in banks[-READ:]:
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
