"""Experts that the device takes from the CPU in a short step, reading them over the bus itself
while the CPU computes the others. One token reads them where they lie; for several they are copied
to staging memory first, as each of an expert's tokens would read it again. Knows memory; how many
come is `quota`'s, and who they are is decided on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.quota import Pace, quotas
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests
from greenroom.kernels.planes import Cutter


class Bus:
    """What all layers of a device share.

    Args:
        quota: (longest short step, experts) int32 on the device, see `quota.quotas`, by tokens - 1.
        places: (experts,) int32 on the device.
        staging: (bytes,) uint8 on the device that nobody else uses in short steps.
    """

    def __init__(self, quota: Tensor, places: Tensor, staging: Tensor) -> None:
        self.quota, self.places, self.staging = quota, places, staging
        self._found = np.zeros(quota.shape, np.int32)  # the same in RAM

    def comes(self, tokens: int) -> bool:
        """Whether there are ever guests in a step of so many tokens."""
        return bool(self._found[tokens - 1].any())

    @property
    def ever(self) -> bool:
        """Whether there are guests in any step."""
        return bool(self._found.any())

    def decide(self, pace: Pace, banks: Sequence[CpuExperts], used: int) -> None:
        """Decides how many come, before any step is recorded."""
        nbytes = max(bank.layout.nbytes for bank in banks)
        room, (longest, experts) = len(self.staging) // nbytes, self.quota.shape
        steps = range(1, longest + 1)
        self._found = np.stack([quotas(pace, experts, used, room, n) for n in steps])
        self.quota.copy_(torch.from_numpy(self._found))

    def plan(self, used: int) -> str:
        """In one line, for steps of one token and for the longest."""
        steps, experts = self._found.shape
        one, many = self._found[0, used - 1], self._found[-1, -1]
        return (
            f"of experts in RAM the GPU reads {one} of {used} over the bus itself while the CPU "
            f"computes the others, in steps of {steps} tokens {many} of {experts}"
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
        if not bus.comes(tokens):
            return None
        memory = self._source if tokens == 1 else self._copies
        quota, places = bus.quota[tokens - 1, :count], bus.places[:count]
        return Guests(quota, places, memory, self._source, tokens)

    def hits(self, hidden: Tensor, ids: Tensor, weights: Tensor, guests: Guests) -> Tensor:
        """See `beside.Bus.hits`."""
        arguments = (hidden.contiguous(), ids.contiguous(), weights.contiguous())
        where = guests.memory, guests.places, self._layout
        return hits(*where, *arguments, self._activation, None, self.cut)
