"""How likely a layer's experts are to be wanted in a long step, from the long steps before it.
Texts differ, but a layer need not spread its routes evenly over its experts.
"""

import math
from collections.abc import Sequence

import numpy as np

NEWS = 0.25  # weight of the last step
LIKELY = 0.9  # chance from which on an expert sets off before it is asked for
EVEN = 0.5  # the same while the bus has nothing else to do


class Demand:
    """What is known of one layer; at first that all experts are alike, and wanted.

    Args:
        experts: of the layer.
    """

    def __init__(self, experts: int) -> None:
        self._chance = np.ones(experts)
        self._shares = np.full(experts, 1 / experts)

    def count(self, sizes: Sequence[int]) -> None:
        """Takes the routes of a step to each expert; few of them say little."""
        uses = np.asarray(sizes)
        if self._many(int(uses.sum())):
            self._chance += NEWS * ((uses > 0) - self._chance)
            self._shares += NEWS * (uses / uses.sum() - self._shares)

    def likely(self, experts: Sequence[int], routes: int) -> list[int]:
        """Those of some experts that a step of so many routes is likely to want, those with the
        most routes first."""
        if not self._many(routes):
            return []
        found = [e for e in experts if self._chance[e] >= LIKELY]
        return sorted(found, key=lambda e: -self._shares[e])

    def perhaps(self, experts: Sequence[int], routes: int) -> list[int]:
        """Those of some experts that such a step wants at least every other time, but for the
        likely ones; those with the best chance first."""
        if not self._many(routes):
            return []
        found = [e for e in experts if EVEN <= self._chance[e] < LIKELY]
        return sorted(found, key=lambda e: -self._chance[e])

    def expected(self, experts: Sequence[int]) -> int:
        """How many of some experts a step of many routes will want."""
        return round(float(self._chance[list(experts)].sum()))

    def _many(self, routes: int) -> bool:
        """Whether nearly all experts would be wanted, if they were alike."""
        return 1 - math.exp(-routes / len(self._chance)) >= LIKELY
