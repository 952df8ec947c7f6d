"""How many experts without a slot the device takes from the CPU in a short step: as many as make
the layer shortest. Knows paces alone; without torch, as planning goes by the same rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Seconds, H100 with 16 cores, 26 November 2026: of the CPU for a layer's experts, however many they
# are; the bells of CPU and device; and of the device, which starts several kernels one after the
# other.
MEETING = 6e-6
BELLS = 11e-6
ARRIVAL = 15e-6
WORTH = 0.95  # of the time: more guests must save more than the rest


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that the experts of a layer take in a short step, besides `MEETING` and `ARRIVAL`.

    Attributes:
        expert: of the CPU, for each with one token.
        row: of the CPU, for each further token of an expert.
        guest: of the device, for each that it reads where it lies.
        copy: of the bus, for each that is copied to the device.
        route: of the device, for each route to one that was copied.
        slowed: times as long the CPU takes while the device reads the same memory.
    """

    expert: float
    row: float
    guest: float
    copy: float
    route: float
    slowed: float


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
    seconds = layer_seconds(pace, experts, used, room, tokens)
    enough = WORTH * seconds <= seconds.min(1, keepdims=True)
    found = enough.argmax(1).astype(np.int32)
    return np.pad(found, (0, experts - len(found)), "edge")


def layer_seconds(
    pace: Pace, experts: int, used: int, room: int, tokens: int
) -> NDArray[np.float64]:
    """What a layer's experts without a slot take, see `quotas`.

    Returns:
        (most, most + 1) seconds by how many they are, at most as many as the tokens use, less one,
        and how many of them the device takes; infinity where it cannot.
    """
    most = min(experts, tokens * used)
    rows = rows_of(experts, used, tokens)[:most, :most]
    missing, guests = np.ogrid[1 : most + 1, 0 : most + 1]
    left = np.maximum(missing - guests, 0)
    cpu = left * pace.expert + (_first(rows, left) - left) * pace.row
    bus = guests * pace.guest
    if tokens > 1:
        routes = rows.sum(1, keepdims=True) - _first(rows, left)
        bus = guests * pace.copy + routes * pace.route
    bus = bus + ARRIVAL * (guests > 0)
    beside = np.minimum(cpu, bus / pace.slowed)  # of the CPU's work, done while the bus is busy
    cpu = cpu + beside * (pace.slowed - 1) + (MEETING + BELLS) * (left > 0)
    seconds: NDArray[np.float64] = np.maximum(cpu, bus)
    seconds[(guests > missing) | (guests > (room if tokens > 1 else experts))] = np.inf
    return seconds


@lru_cache(256)
def binomial(number: int, share: float) -> Mapping[int, float]:
    """How likely 1, 2, ... of so many are, each with this share; of tokens that use an expert, or
    of experts that have no slot."""
    if not 0 < share < 1:
        return {number: 1.0} if share else {}
    found = {}
    for n in range(1, number + 1):
        ways = math.lgamma(number + 1) - math.lgamma(n + 1) - math.lgamma(number - n + 1)
        likely = math.exp(ways + n * math.log(share) + (number - n) * math.log1p(-share))
        if likely > 1e-7:
            found[n] = likely
    return found


def rows_of(experts: int, used: int, tokens: int) -> NDArray[np.float64]:
    """Tokens of each of 1, 2, ... experts that any of so many tokens use, (experts, experts), in a
    line the fewest first and zeros behind: quantiles of what uniform routing gives."""
    likely = binomial(tokens, used / experts)
    counts = np.array([*likely])
    below = np.cumsum([*likely.values()]) / sum(likely.values())
    number, of = np.ogrid[0:experts, 1 : experts + 1]
    found = counts[np.minimum(np.searchsorted(below, (number + 0.5) / of), len(counts) - 1)]
    return np.where(number < of, found, 0).T.astype(np.float64)


def _first(values: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of the first so many of each line."""
    sums = np.pad(np.cumsum(values, 1), ((0, 0), (1, 0)))
    return np.take_along_axis(sums, count, 1)
