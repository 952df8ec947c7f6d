"""How fast bus and CPU are when both are busy with a model's experts, measured when it is loaded.

The figures are rounded, so that another run seldom shares experts out in another way: their sums
differ in the last digits with the processor that forms them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts

STEPS = 4  # to a factor of two
PIECE = 32 << 20  # bytes of a copy
BUSY, MOST_COPIES = 0.1, 1000  # seconds that the bus is kept busy for
LAYERS = 12  # computed for one token, so many at most
TOGETHER = 32  # tokens of the longer measurement


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one model on one machine.

    Attributes:
        bus: bytes the device reads in a second.
        expert: seconds the CPU needs for an expert with one token, at least.
        row: seconds it needs for each of many tokens of an expert.
    """

    bus: float
    expert: float
    row: float

    def computing(self, rows: float) -> float:
        """Seconds of the CPU for an expert with so many tokens."""
        return max(self.expert, rows * self.row)


def rounded(value: float) -> float:
    """The nearest power of two, in quarter steps."""
    return float(2 ** (round(STEPS * math.log2(value)) / STEPS))


def measure(banks: Sequence[CpuExperts], used: int, there: Tensor) -> Pace:
    """Computes some layers' experts while copies go over the bus; takes some 100 ms.

    Args:
        banks: the slabs of each layer, pinned and in one piece.
        used: experts of a token.
        there: (bytes,) uint8 on a GPU, overwritten.
    """
    event: Any = torch.cuda.Event
    assert banks[0].block is not None
    piece = torch.from_numpy(banks[0].block.reshape(-1)[: min(PIECE, len(there))])
    there = there[: len(piece)]
    start, first, last = (event(enable_timing=True) for _ in range(3))
    for each in (start, first):
        each.record()
        there.copy_(piece, non_blocking=True)
    first.synchronize()
    alone = max(start.elapsed_time(first) / 1e3, BUSY / MOST_COPIES)
    copies = math.ceil(BUSY / alone)
    for _ in range(copies):
        there.copy_(piece, non_blocking=True)
    last.record()
    expert, row = _computing(banks, used)
    last.synchronize()
    bus = (copies + 1) * len(piece) / (first.elapsed_time(last) / 1e3)
    return Pace(rounded(bus), rounded(expert), rounded(row))


def _computing(banks: Sequence[CpuExperts], used: int) -> tuple[float, float]:
    """Seconds of an expert with one token, and of a token of an expert that has several."""
    _seconds(banks[0], 1, used)  # buffers grow, threads wake
    some = banks[:: max(1, len(banks) // LAYERS)]
    one = sorted(_seconds(bank, 1, used) for bank in some)[len(some) // 2]
    return one / used, _seconds(banks[-1], TOGETHER, used) / (TOGETHER * used)


def _seconds(bank: CpuExperts, tokens: int, used: int) -> float:
    """Of a call in which every token uses `used` experts, others than those before it."""
    hidden = torch.zeros(tokens, bank.layout.d)
    ids = torch.arange(tokens * used, dtype=torch.int32).view(tokens, used) % bank.experts
    begin = time.perf_counter()
    bank(hidden, ids, torch.ones(tokens, used))
    return time.perf_counter() - begin
