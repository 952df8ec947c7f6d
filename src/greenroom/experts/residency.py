"""Which experts deserve a VRAM slot: recency weighed with frequency, changed with hysteresis.

Heat is a count of routes that halves every `half_life` steps, or sooner (`age`), so an expert used
now outweighs one used long ago, and among equally recent ones the frequent wins. An expert takes a
slot only when it is clearly hotter than the coldest resident, so that nearly uniform routing does
not churn. Decides only; copying is the store's work.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Move:
    """One promotion: expert (layer, expert) takes `slot`; whoever held it leaves. `gain` is how
    much hotter than that one it is."""

    layer: int
    expert: int
    slot: int
    gain: float = field(default=0.0, compare=False)


class Residency:
    """The table of who sits where, and the heat it is decided by.

    Args:
        layers, experts: size of the table.
        slots: VRAM slots, shared by all layers (their slabs have one layout).
        half_life: steps in which an unused expert's heat halves.
        margin: how much hotter a newcomer must be, as a ratio, and at least this many routes.

    Attributes:
        kept: (layers,) bool, layers whose experts never leave, however cold they are.
    """

    def __init__(
        self, layers: int, experts: int, slots: int, half_life: float = 256, margin: float = 1.25
    ) -> None:
        self.slot_of: NDArray[np.int32] = np.full((layers, experts), EMPTY, np.int32)
        self._seen = np.zeros((layers, experts))  # heat of routes whose expert is known
        self._unseen = np.zeros(layers)  # heat of those that the layer did not compute
        self.kept: NDArray[np.bool_] = np.zeros(layers, np.bool_)
        self.margin = margin
        self._holder = np.full(slots, EMPTY, np.int64)  # flat (layer, expert) index of each slot
        self._decay = 0.5 ** (1 / half_life)
        self._growth = 1.0  # heat is kept inflated instead of decaying the table every step

    @property
    def slots(self) -> int:
        return len(self._holder)

    @property
    def resident(self) -> int:
        return int((self._holder != EMPTY).sum())

    def observe(self, ids: NDArray[np.integer]) -> None:
        """Counts one step's routes; ids: (layers, ...) expert ids, -1 where there is none."""
        layers = len(self.slot_of)
        flat = ids.reshape(layers, -1)
        layer, column = np.nonzero(flat >= 0)
        counts = np.zeros(self.slot_of.shape, np.int64)
        np.add.at(counts, (layer, flat[layer, column]), 1)
        self.observe_counts(counts)

    def observe_counts(self, counts: NDArray[np.integer]) -> None:
        """Counts one step's routes; counts: (layers, experts), how often each was chosen.

        The last layer computes only the rows somebody asked for, few of a prompt's. What a layer
        saw less of the step than another is noted as unseen, see `heat`.
        """
        totals = counts.sum(1)
        self._seen += counts * self._growth
        self._unseen += (totals.max() - totals) * self._growth
        self._growth /= self._decay
        if self._growth > 1e100:
            self._seen /= self._growth
            self._unseen /= self._growth
            self._growth = 1.0

    def age(self, steps: float) -> None:
        """Heat becomes as much less as in so many steps."""
        self._growth /= self._decay**steps

    @property
    def heat(self) -> NDArray[np.float64]:
        """(layers, experts), up to a factor: routes seen, and a layer's unseen ones, spread.

        They are spread anew by all that the layer has seen so far, so that the first tokens
        correct the guess about the prompt before them. Few routes say little: shares begin equal,
        and these weigh as many routes as a Dirichlet prior that is as uneven as the layers that
        saw most: few where routing is skewed, many where it is uniform, lest chance moves experts.
        """
        if not self._unseen.any():
            return self._seen
        experts, seen = self._seen.shape[1], self._seen.sum(1, keepdims=True)
        shares = self._seen / np.maximum(seen, 1e-9)
        best = self._unseen == self._unseen.min()
        same = (shares[best] ** 2).sum(1).mean()  # chance that two routes choose one expert
        weight = self._growth * max(1.0, (1 - same) / max(same - 1 / experts, 1e-9))
        shares = (self._seen + weight / experts) / (seen + weight)
        spread: NDArray[np.float64] = self._seen + self._unseen[:, None] * shares
        return spread

    def _errors(self, heat: NDArray[np.float64]) -> NDArray[np.float64]:
        """(layers, experts), standard errors of `heat`: routes seen are counts, the others follow
        from them."""
        seen = np.maximum(self._seen.sum(1, keepdims=True), 1e-9)
        variance = heat * self._growth * heat.sum(1, keepdims=True) / seen
        errors: NDArray[np.float64] = np.sqrt(variance)
        return errors

    def plan(self, limit: int, errors: float = 0.0) -> list[Move]:
        """The at most `limit` promotions that pay most, hottest first; does not apply them.

        Args:
            limit: most of them.
            errors: by how many standard errors a newcomer must be hotter, beside the margin.
        """
        if limit <= 0 or not self.slots:
            return []
        heat, outside = self.heat, self.slot_of.ravel() == EMPTY
        flat_heat, doubt = heat.ravel(), errors * self._errors(heat).ravel()
        waiting = np.flatnonzero(outside & (flat_heat > 0))
        count = min(limit, len(waiting), self.slots)
        if not count:
            return []
        order = waiting[np.lexsort((waiting, (doubt - flat_heat)[waiting]))[:count]]
        taken = self._holder != EMPTY
        seat_heat = np.where(taken, flat_heat[self._holder], -1.0)
        seat_doubt = np.where(taken, doubt[self._holder], 0.0)
        seat_heat[taken & self.kept[self._holder // self.slot_of.shape[1]]] = np.inf
        seats = np.lexsort((np.arange(self.slots), seat_heat + seat_doubt))[:count]
        moves = []
        for candidate, seat in zip(order, seats, strict=True):
            held = seat_heat[seat]
            clear = max(self._growth, float(np.hypot(doubt[candidate], seat_doubt[seat])))
            if held >= 0 and flat_heat[candidate] <= max(held * self.margin, held + clear):
                continue
            layer, expert = divmod(int(candidate), self.slot_of.shape[1])
            gain = float(flat_heat[candidate] - max(held, 0.0))
            moves.append(Move(layer, expert, int(seat), gain))
        return moves

    def vacate(self, slot: int) -> int:
        """Takes the slot from its holder; returns the holder's flat index, or -1."""
        left = int(self._holder[slot])
        if left != EMPTY:
            self.slot_of.ravel()[left] = EMPTY
            self._holder[slot] = EMPTY
        return left

    def apply(self, move: Move) -> int:
        """Records a finished copy; returns the flat index of the expert that left, or -1."""
        left = self.vacate(move.slot)
        self._holder[move.slot] = move.layer * self.slot_of.shape[1] + move.expert
        self.slot_of[move.layer, move.expert] = move.slot
        return left

    def shrink(self, slots: int) -> None:
        """Leaves the first `slots`; whoever sat in another has none any more."""
        for slot in range(slots, self.slots):
            self.vacate(slot)
        self._holder = self._holder[:slots].copy()

    @property
    def held(self) -> list[Move]:
        """Who sits where, as the moves that would bring it about."""
        taken = np.flatnonzero(self._holder != EMPTY)
        width: int = self.slot_of.shape[1]
        return [Move(*divmod(int(self._holder[slot]), width), int(slot)) for slot in taken]

    def warm(self, heat: NDArray[np.floating]) -> None:
        """Starts from a saved heat table (layers, experts) instead of from nothing."""
        if heat.shape != self.slot_of.shape:
            raise ValueError(f"heat has shape {heat.shape}, this model {self.slot_of.shape}")
        self._seen = heat.astype(float) * self._growth
        self._unseen[:] = 0
