"""How many experts the device takes from the CPU in a short step, reading them over the bus itself
while the CPU computes the others: as many as make the layer shortest. One token reads them where
they lie; for several they are copied to staging memory first, as each of an expert's tokens would
read it again. Knows paces and memory; who comes is decided on the device.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.pace import ARRIVAL, MEETING, Pace
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests
from greenroom.kernels.planes import Cutter

# Seconds, H100 with 16 cores, 26 November 2026: the bells of CPU and device, and a route that is
# computed from a copy.
BELLS = 11e-6
ROUTE = 5e-6
WORTH = 0.95  # of the time: more guests must save more than the rest


def quotas(pace: Pace, experts: int, used: int, room: int, tokens: int) -> NDArray[np.int32]:
    """How many of 1, 2, ... experts that have no slot the device takes in a step.

    Args:
        pace: of bus and CPU.
        experts, used: of a layer, and of them by each token.
        room: copies there are places for; of one token none are needed.
        tokens: of the step.

    Returns:
        (experts,) int32.
    """
    rows = rows_of(experts, used, tokens)
    missing, guests = np.ogrid[1 : experts + 1, 0 : experts + 1]
    left = np.maximum(missing - guests, 0)
    cpu = _first(np.maximum(pace.expert, rows * pace.row), left)
    bus = guests * pace.guest
    if tokens > 1:
        bus = guests * pace.copy + ROUTE * (rows.sum(1, keepdims=True) - _first(rows, left))
    bus = bus + ARRIVAL * (guests > 0)
    beside = np.minimum(cpu, bus / pace.slowed)  # of the CPU's work, done while the bus is busy
    cpu = cpu + beside * (pace.slowed - 1) + (MEETING + BELLS) * (left > 0)
    seconds = np.maximum(cpu, bus)
    seconds[(guests > missing) | (guests > (room if tokens > 1 else experts))] = np.inf
    enough = WORTH * seconds <= seconds.min(1, keepdims=True)
    found: NDArray[np.int32] = enough.argmax(1).astype(np.int32)
    return found


def rows_of(experts: int, used: int, tokens: int) -> NDArray[np.float64]:
    """Tokens of each of 1, 2, ... experts that any of so many tokens use, (experts, experts), in a
    line the fewest first and zeros behind: quantiles of what uniform routing gives."""
    counts = np.arange(1, tokens + 1)
    share = min(used / experts, 1 - 1e-9)
    ways = np.array([math.comb(tokens, n) for n in range(1, tokens + 1)], np.float64)
    likely = ways * share**counts * (1 - share) ** (tokens - counts)
    below = np.cumsum(likely) / likely.sum()
    number, of = np.ogrid[0:experts, 1 : experts + 1]
    found = counts[np.minimum(np.searchsorted(below, (number + 0.5) / of), tokens - 1)]
    return np.where(number < of, found, 0).T.astype(np.float64)


def _first(values: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of the first so many of each line."""
    sums = np.pad(np.cumsum(values, 1), ((0, 0), (1, 0)))
    return np.take_along_axis(sums, count, 1)


class Bus:
    """What all layers of a device share.

    Args:
        quota: (longest short step, experts) int32 on the device, see `quotas`, by tokens - 1.
        places: (experts,) int32 on the device.
        staging: (bytes,) uint8 on the device that nobody else uses in short steps.
    """

    def __init__(self, quota: Tensor, places: Tensor, staging: Tensor) -> None:
        self.quota, self.places, self.staging = quota, places, staging
        self.comes = [False] * len(quota)  # whether there are ever guests

    def follow(self, pace: Pace, banks: Sequence[CpuExperts], used: int) -> None:
        """Decides how many come in steps to be recorded from now on."""
        nbytes = max(bank.layout.nbytes for bank in banks)
        room, (longest, experts) = len(self.staging) // nbytes, self.quota.shape
        steps = range(1, longest + 1)
        found = np.stack([quotas(pace, experts, used, room, n) for n in steps])
        self.quota.copy_(torch.from_numpy(found))
        self.comes = [bool(row.any()) for row in found]

    def plan(self, used: int) -> str:
        """In one line, for steps of one token and for the longest."""
        one, many = (
            int(self.quota[row, m - 1]) for row, m in ((0, used), (-1, self.quota.shape[1]))
        )
        return (
            f"of experts in RAM the GPU reads {one} of {used} over the bus itself while the CPU "
            f"computes the others, in steps of {len(self.quota)} tokens {many} of "
            f"{self.quota.shape[1]}"
        )


class LayerBus:
    """The bus as one layer sees it.

    Args:
        bus: of all layers.
        cpu: the layer's slabs, pinned and in one piece.

    Attributes:
        cut: cuts hidden states into planes.
    """

    def __init__(self, bus: Bus, cpu: CpuExperts) -> None:
        assert cpu.block is not None
        self._bus, self._layout, self._activation = bus, cpu.layout, cpu.activation
        self._source = torch.from_numpy(cpu.block)
        room, slab = len(bus.staging) // cpu.layout.nbytes, cpu.layout.nbytes
        self._copies = bus.staging[: room * slab].view(room, slab)
        self.cut = Cutter()

    def guests(self, tokens: int) -> Guests | None:
        """See `beside.Bus.guests`."""
        bus, count = self._bus, len(self._source)
        if not bus.comes[tokens - 1]:
            return None
        memory = self._source if tokens == 1 else self._copies
        quota, places = bus.quota[tokens - 1, :count], bus.places[:count]
        return Guests(quota, places, memory, self._source, tokens)

    def hits(self, hidden: Tensor, ids: Tensor, weights: Tensor, guests: Guests) -> Tensor:
        """See `beside.Bus.hits`."""
        arguments = (hidden.contiguous(), ids.contiguous(), weights.contiguous())
        where = guests.memory, guests.places, self._layout
        return hits(*where, *arguments, self._activation, None, self.cut)
