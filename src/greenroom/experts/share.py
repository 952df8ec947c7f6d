"""Which of a layer's experts the CPU computes in a long step while the others are on the bus.

The choice follows from rates that are known when the model is loaded and from who is on the bus
already, never from the clock during steps: the CPU rounds otherwise than the GPU, and the same
requests in the same order must give the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Share of the time of a layer's copies that the CPU may need. On an H100 with disturbed processors,
# 26 November 2026, 1.0 was faster than 1.1 in six of eight pairs of runs, at 512 and 2,048 tokens
# of two models, 1.2 and 1.25 slower than both in most.
LENT = 1.0
LEAST = 1 / 16  # of the absent experts; fewer are not worth that
# Seconds of a layer that the CPU cannot compute in: from its last sum to the next layer's routes,
# and until rows are there. gpt-oss-20b on two H100s, 26 November 2026: 0.4 ms to the routes at 512
# tokens and 1.0 to 1.4 at 2,048, 0.3 of the host, 0.4 until rows are there and the end is noticed.
MEETING = 0.9e-3
MEETING_ROUTE = 0.1e-6  # more for each route
FEWEST, FEW = 2, 16  # tokens of an expert with which reading is measured; one costs no less


@dataclass(frozen=True, slots=True)
class Rates:
    """What bus and CPU do in a second.

    Attributes:
        bus: bytes copied to the device.
        reading: bytes of experts with `FEW` tokens that the CPU gets through meanwhile.
        operations: of the tokens beyond those, two for each multiplication.
        reading_fewest: as `reading`, with `FEWEST` or less; 0: no more than that.
    """

    bus: float
    reading: float
    operations: float
    reading_fewest: float = 0.0

    def copying(self, nbytes: int) -> float:
        """Seconds of the bus for an expert."""
        return nbytes / self.bus

    def computing(self, tokens: float, nbytes: int, weights: int) -> float:
        """Seconds of the CPU for an expert, told its bytes and weights."""
        few, more = nbytes / self.reading, max(0.0, tokens - FEW)
        one = nbytes / max(self.reading_fewest, self.reading)
        part = min(1.0, max(0.0, tokens - FEWEST) / (FEW - FEWEST))
        return (1 - part) * one + part * few + 2 * more * weights / self.operations


@dataclass(slots=True)
class Share:
    """The rule.

    Attributes:
        rates: of the machine; None until it was measured, then nothing is lent.
        lent: share of the time of a layer's copies that the CPU may take.
        meeting, route: seconds of a layer that the CPU cannot compute in, and more by route.
        least: share of the absent experts below which none is lent.
    """

    rates: Rates | None = None
    lent: float = LENT
    meeting: float = MEETING
    route: float = MEETING_ROUTE
    least: float = LEAST

    def lend(
        self, waiting: Sequence[int], absent: int, sizes: Sequence[float], nbytes: int, weights: int
    ) -> list[int]:
        """The experts for the CPU: those with the fewest tokens, as many as take it at most the
        share `lent` of the time of the other absent ones' copies, meeting the CPU included.

        Args:
            waiting: experts that neither have a place on the device nor are on their way.
            absent: how many must come to the device or are computed by the CPU.
            sizes: tokens of each expert of the layer.
            nbytes, weights: of an expert.
        """
        found, rates = list[int](), self.rates
        if rates is None:
            return found
        busy, copying = self.meeting + self.route * sum(sizes), absent * rates.copying(nbytes)
        for expert in sorted(waiting, key=lambda e: sizes[e]):
            busy += rates.computing(sizes[expert], nbytes, weights)
            copying -= rates.copying(nbytes)
            if busy > self.lent * copying:
                break
            found.append(expert)
        return sorted(found) if len(found) >= self.least * absent else []

    def idle(self, routes: int, nbytes: int) -> int:
        """About how many experts come over the bus while routes are waited for and nothing else
        does: that takes about as long as the CPU waits."""
        if self.rates is None:
            return 0
        return int((self.meeting + self.route * routes) / self.rates.copying(nbytes))

    @staticmethod
    def ahead(absent: int, lent: int) -> int:
        """How many of a layer's absent experts may set off before its routes are known, when about
        so many will be lent: what is left is twice as many, to choose from."""
        return max(0, absent - 2 * lent, min(absent - lent, absent // 4))
