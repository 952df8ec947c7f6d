"""Which of a layer's experts the CPU computes in a long step while the others are on the bus.

The choice follows from rates that are known when the model is loaded, never from the clock during
steps: the CPU rounds otherwise than the GPU, and the same text must come out every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from greenroom import native

# Where nothing was measured: of a thread, per second. Reading beside copies that take their share
# of the memory; operations of the model, each two of the processor's, as activations keep 16 bits.
BUS = 50e9
THREAD_BYTES = 4.5e9
THREAD_OPERATIONS = {
    "portable": 0.002e12, "avx2": 0.02e12, "avxvnni": 0.03e12, "avx512": 0.04e12, "amx": 0.06e12,
}  # fmt: skip
LENT = 0.9  # share of the time of a layer's copies that the CPU may need
# Seconds of a layer that the CPU cannot compute in: from its last sum to the next layer's routes,
# and until rows are there. On an H100, 25 November 2026: rows and bells 0.5 ms, attention and dense
# products of gpt-oss-20b 0.3 ms at 512 tokens and 0.9 at 2,048.
MEETING = 0.8e-3
MEETING_ROUTE = 0.1e-6  # more for each route


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

    def copying(self, nbytes: int) -> float:
        """Seconds of the bus for an expert."""
        return nbytes / self.bus

    def computing(self, tokens: float, nbytes: int, weights: int) -> float:
        """Seconds of the CPU for an expert, told its bytes and weights."""
        return max(nbytes / self.reading, 2 * tokens * weights / self.operations)

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
        meeting, route: seconds of a layer that the CPU cannot compute in, and more by route.
    """

    rates: Rates
    lent: float = LENT
    meeting: float = MEETING
    route: float = MEETING_ROUTE

    def lend(
        self, waiting: Sequence[int], absent: int, sizes: Sequence[float], nbytes: int, weights: int
    ) -> list[int]:
        """The experts for the CPU: those with the fewest tokens, as many as are ready when the
        other absent ones are copied, meeting the CPU included.

        Args:
            waiting: experts that neither have a place on the device nor are on their way.
            absent: how many must come to the device or are computed by the CPU.
            sizes: tokens of each expert of the layer.
            nbytes, weights: of an expert.
        """
        found = list[int]()
        busy, copying = self.meeting + self.route * sum(sizes), absent * self.rates.copying(nbytes)
        for expert in sorted(waiting, key=lambda e: sizes[e]):
            busy += self.rates.computing(sizes[expert], nbytes, weights)
            copying -= self.rates.copying(nbytes)
            if busy > self.lent * copying:
                break
            found.append(expert)
        return sorted(found)

    @staticmethod
    def ahead(absent: int, lent: int) -> int:
        """How many of a layer's absent experts may set off before its routes are known, when about
        so many will be lent: what is left is twice as many, to choose from."""
        return max(absent - 2 * lent, min(absent - lent, absent // 4))
