"""Which of a layer's experts the CPU computes in a long step while the others are on the bus.

The choice follows from rates that are known when the model is loaded, never from the clock during
steps: the CPU rounds otherwise than the GPU, and the same text must come out every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from greenroom import native
from greenroom.experts.slabs import SlabLayout

# Where nothing was measured: of a thread, per second. Reading beside copies that take their share
# of the memory; operations of the model, each two of the processor's, as activations keep 16 bits.
BUS = 50e9
THREAD_BYTES = 4.5e9
THREAD_OPERATIONS = {
    "portable": 0.002e12, "avx2": 0.02e12, "avxvnni": 0.03e12, "avx512": 0.04e12, "amx": 0.06e12,
}  # fmt: skip
LENT = 0.8  # share of the time of a layer's copies that the CPU has: attention goes first
MEETING = 3.5e-3  # seconds of a layer for rows to the CPU, waiting and rows back, there


@dataclass(frozen=True, slots=True)
class Rates:
    """What bus and CPU do in a second.

    Attributes:
        bus: bytes copied to the device.
        reading: bytes of experts that the CPU reads meanwhile.
        operations: of experts with many tokens on the CPU, two for each multiplication.
    """

    bus: float
    reading: float
    operations: float

    @staticmethod
    def usual(threads: int) -> "Rates":
        """Of a machine that was not measured."""
        operations = THREAD_OPERATIONS[native.lib().tier]
        return Rates(BUS, threads * THREAD_BYTES, threads * operations)


@dataclass(slots=True)
class Share:
    """The rule.

    Attributes:
        rates: of the machine.
        lent: share of the time of a layer's copies that the CPU may take.
        meeting: seconds that pass in a layer as soon as the CPU takes any.
    """

    rates: Rates
    lent: float = LENT
    meeting: float = MEETING

    def lend(
        self, waiting: Sequence[int], absent: int, sizes: Sequence[int], layout: SlabLayout
    ) -> list[int]:
        """The experts for the CPU: those with the fewest tokens, as many as are ready when the
        other absent ones are copied, meeting the CPU included.

        Args:
            waiting: experts that neither have a place on the device nor are on their way.
            absent: how many must come to the device or are computed by the CPU.
            sizes: tokens of each expert of the layer.
            layout: of the slabs.
        """
        rates, found = self.rates, list[int]()
        busy, copying = self.meeting, absent * layout.nbytes / rates.bus
        for expert in sorted(waiting, key=lambda e: sizes[e]):
            operations = 6 * sizes[expert] * layout.d * layout.f
            busy += max(layout.nbytes / rates.reading, operations / rates.operations)
            copying -= layout.nbytes / rates.bus
            if busy > self.lent * copying:
                break
            found.append(expert)
        return sorted(found)
