"""Experts in VRAM: slots of one size per slab layout, and the table that says who sits where.

The table on the device changes only between steps, and a slot's new holder is entered only when
its bytes have arrived. Who deserves a slot is decided by `residency`; what is computed from slots
is `kernels.experts`' business.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.experts.arena import Arena, arenas
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import PAGE_BYTES, SHORT_STEP
from greenroom.experts.residency import EMPTY, Move
from greenroom.experts.resident import ResidentMlp
from greenroom.experts.selfcheck import MOVES, SelfCheck
from greenroom.experts.uselog import SEEN, Account, Seen, UseLog
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests
from greenroom.kernels.planes import Cutter
from greenroom.kernels.sorting import by_expert

EVERY = 4  # steps between promotions
# After long steps many are promoted, if they are surely hotter than those that leave.
BURST = 1 / 8  # of the bytes of the experts without a slot that such a step used, and of its time
BURST_BYTES = 8 * PAGE_BYTES  # at once
BURST_SECONDS = 8e-3  # of the bus at once: a step's inputs may have to wait for it
SURE = 4.0  # standard errors
AGED = 512  # tokens of a long step, at most, that make what was hot before it older

_COUNTED = "hits", "misses", "stayed"  # the last: hits had nobody moved lately


class LayerSlots:
    """The slots as one layer sees them.

    Attributes:
        memory: (slots, slab bytes) uint8, shared with the layers of equal layout.
        table: (experts,) int32 on the device, an expert's slot or -1.
        full: whether there is a slot for every expert; then none ever leaves.
        cut: cuts hidden states into planes.
    """

    full = False

    def __init__(
        self,
        memory: Tensor,
        table: Tensor,
        seats: NDArray[np.int32],
        seen: Seen,
        cpu: CpuExperts,
        chunk: int = 0,
    ) -> None:
        self.memory = memory
        self.table = table
        self.seen = seen
        self._seats = seats
        self._layout = cpu.layout
        self._activation = cpu.activation
        self.cut = Cutter()
        self._mlp = ResidentMlp(cpu.layout, cpu.activation, cpu.experts, chunk)

    def takes(self, routes: int) -> bool:
        """Whether `many` computes steps of so many routes."""
        return self.full and self._mlp.takes(routes)

    def many(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`hits` for many tokens, if it `takes` them."""
        arguments = (hidden.contiguous(), ids, weights)
        total, starts = self._mlp(self.memory, self.table, *arguments)
        self.seen.later(starts)
        return total

    def hits(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, guests: Guests | None = None
    ) -> Tensor:
        """The sum over routes whose expert has a slot or is a guest, see `kernels.experts.hits`."""
        where = self.memory, self.table, self._layout
        arguments = (hidden.contiguous(), ids.contiguous(), weights.contiguous())
        seen = self.seen.row(ids)
        return hits(*where, *arguments, self._activation, seen, self.cut, guests)

    def passed_by(self, ids: Tensor) -> None:
        """Counts a long step that is left to the CPU; ids: (tokens, k) int32."""
        self.seen.later(by_expert(ids.contiguous(), len(self.table))[2])

    def count(self, uses: Sequence[int]) -> None:
        """Tells of a long step how often each expert was chosen."""
        self.seen.log.add(self.seen.layer, uses)

    def places(self) -> dict[int, int]:
        """Slot of each resident expert, as the host knows it."""
        return {int(e): int(self._seats[e]) for e in np.flatnonzero(self._seats != EMPTY)}


class Slots:
    """All slots of a model.

    Args:
        account: where memory is booked.
        banks: the slabs of each MoE layer.
        nbytes: memory for slots; what is left over is less than one slab per layout.
        heat: (layers, experts), how much each expert is in demand; None if nothing is known.
        chunk: most tokens of a step, if known.

    Attributes:
        bus: bytes it copies in a second; many are promoted at once only where that is known.
    """

    def __init__(
        self,
        account: Account,
        banks: Sequence[CpuExperts],
        nbytes: int,
        heat: NDArray[np.floating] | None = None,
        chunk: int = 0,
    ) -> None:
        experts = max(bank.experts for bank in banks)
        self.seats: NDArray[np.int32] = np.full((len(banks), experts), EMPTY, np.int32)
        self.table = account.empty("slots", self.seats.shape, torch.int32).fill_(EMPTY)
        self.log = UseLog(account, len(banks), experts)
        self._full = np.zeros(len(banks), np.bool_)
        self.stats: Counter[str] = Counter()
        self.uses = np.zeros((2, len(banks)), np.int64)  # of slots, and in all, by layer
        self.check, self._used = SelfCheck(len(banks)), True
        self._before: Counter[str] = Counter()  # stats before the step that is counted next
        self._steps = self._tokens = 0
        self._copying = 0, 0  # slabs under way beside the last step, and beside this one
        self._bursts = all(bank.pinned for bank in banks)  # else the host waits for every copy
        self.bus = 0.0
        self._missed = 0  # bytes of experts without a slot that the last step used, if it was long
        self._due = 0  # bytes that may still be promoted for the last long steps
        self._cuda = account.device.type == "cuda"
        self._stream: Any = _stream(account.device)
        self._moving: tuple[Any, list[tuple[Arena, Move]]] | None = None
        self.arenas = arenas(account, banks, nbytes)
        self.layers: list[LayerSlots | None] = [None] * len(banks)
        for arena in self.arenas:
            if heat is not None:
                arena.residency.warm(heat[arena.layers, : arena.banks[0].experts])
            for i, bank in zip(arena.layers, arena.banks, strict=True):
                row, seats = self.table[i, : bank.experts], self.seats[i]
                self.layers[i] = LayerSlots(
                    arena.memory, row, seats[: bank.experts], Seen(self.log, i), bank, chunk
                )
        self._seat_first(heat is not None)
        self._stayed = self.seats != EMPTY  # when the check's window began
        for arena in self.arenas:
            self._settle(arena)

    def _seat_first(self, known: bool) -> None:
        """Fills the slots: by heat where it is known, else with as many of every layer."""
        for arena in self.arenas:
            seats = arena.residency
            moves = seats.plan(seats.slots) if known else []
            taken = {(move.layer, move.expert) for move in moves}
            layers, experts = seats.slot_of.shape
            spread = ((i % layers, i // layers) for i in range(layers * experts))
            free = (place for place in spread if place not in taken)
            moves += [Move(*next(free), slot) for slot in range(len(moves), seats.slots)]
            for move in moves:
                arena.copy(move)
                self._enter(arena, move)
        self._publish()

    def _settle(self, arena: Arena) -> None:
        """Says which layers are full; from now on they stay so."""
        full = arena.residency.kept = (arena.residency.slot_of != EMPTY).all(1)
        self._full[arena.layers] = full
        for i in arena.layers:
            layer = self.layers[i]
            assert layer is not None
            layer.full = bool(self._full[i])

    def _enter(self, arena: Arena, move: Move) -> None:
        self._leave(arena, move.slot)
        arena.residency.apply(move)
        self.seats[arena.layers[move.layer], move.expert] = move.slot

    def _leave(self, arena: Arena, slot: int) -> None:
        left = arena.residency.vacate(slot)
        if left != EMPTY:
            layer, expert = divmod(left, arena.residency.slot_of.shape[1])
            self.seats[arena.layers[layer], expert] = EMPTY

    def _publish(self) -> None:
        """Brings the table to the device, behind the steps that still read the old one."""
        there = torch.from_numpy(np.where(self._in_use, self.seats, EMPTY))
        if self._cuda:
            there = there.pin_memory()
        self.table.copy_(there, non_blocking=True)

    @property
    def _in_use(self) -> NDArray[np.bool_]:
        """(layers, 1) whether a layer's slots are computed from; those of full layers always are,
        as there the CPU is not asked."""
        return (self._full | self._used)[:, None]

    @property
    def resident(self) -> NDArray[np.int64]:
        """Experts with a slot, of each layer."""
        counts: NDArray[np.int64] = (self.seats != EMPTY).sum(1)
        return counts

    def observe(self, uses: NDArray[np.int64]) -> None:
        """Counts one step's routes: how often each expert was chosen, (layers, experts)."""
        seated = (self.seats != EMPTY) & self._in_use
        found = int(uses[seated].sum())
        self.stats["hits"] += found
        self.stats["stayed"] += int(uses[self._stayed & self._in_use].sum())
        self.uses[0] += (uses * seated).sum(1)
        self.uses[1] += uses.sum(1)
        self.stats["misses"] += int(uses.sum()) - found
        for arena in self.arenas:
            arena.residency.observe_counts(uses[arena.layers, : arena.banks[0].experts])

    def step_done(self, tokens: int, seconds: float = 0.0) -> None:
        """Between two steps, when all of the one before is on the device: counts and promotes.

        Args:
            tokens: of the step.
            seconds: what the step before it took; 0 where that is not known.
        """
        uses, copying = self.log.take(), self._copying[0]
        self._due = max(self._due, int(BURST * min(self._missed, self.bus * seconds)))
        self._missed = 0
        if tokens > SHORT_STEP:
            self._age(tokens)
            self._missed = sum(arena.missed(uses) for arena in self.arenas)
        self.observe(uses)
        short = max(self._tokens, tokens) <= SHORT_STEP  # routes of a long step are counted at once
        if short and 0 < self._tokens * self.log.k <= SEEN:
            hits, misses, stayed = (self.stats[n] - self._before[n] for n in _COUNTED)
            seconds = seconds if copying <= MOVES else 0.0  # others tell what few copies cost
            self.check.step(self._tokens, seconds, hits, misses, stayed, copying > 0)
            if self.check.begins:
                self._stayed = self.seats != EMPTY
        self._before, self._tokens = self.stats.copy(), tokens
        self.log.read(tokens)
        self._steps += 1
        if self._used != self.check.using:
            self._used = self.check.using
            self._publish()
        moves = self.check.moves if self._used else 0
        if not self._burst(moves) and self._steps % EVERY == 0:
            self.advance(moves)
        self._copying = self._copying[1], self._under_way

    def _age(self, tokens: int) -> None:
        """A prompt may be another text: it makes heat older, as its tokens one by one would. Where
        others were decoding, they share that; and further chunks do no more than a step."""
        for arena in self.arenas:
            arena.residency.age(max(0.0, min(tokens, AGED) / max(1, self._tokens) - 1))

    @property
    def _under_way(self) -> int:
        """Promotions that were begun and have not been entered."""
        return 0 if self._moving is None else len(self._moving[1])

    def shrink(self) -> int:
        """Between two steps: gives back half of every layout's slots; returns the bytes."""
        self._moving = None  # who was on the way has left its slot and not entered another
        if self._cuda:
            torch.cuda.synchronize()
        freed = 0
        for arena in self.arenas:
            for i in arena.layers:  # nobody else may hold the memory that is given back
                layer = self.layers[i]
                assert layer is not None
                layer.memory = torch.empty(0)
            freed += arena.shrink()
            for i, places in zip(arena.layers, arena.residency.slot_of, strict=True):
                self.seats[i, : len(places)] = places
                layer = self.layers[i]
                assert layer is not None
                layer.memory = arena.memory
            self._settle(arena)
        self._stayed = self.seats != EMPTY
        self._publish()
        return freed

    def report(self) -> dict[str, Any]:
        """What `engine.stats()["experts"]` says."""
        peak = max((arena.residency.heat.max() for arena in self.arenas), default=0.0) or 1.0
        heat = np.zeros(self.seats.shape)
        for arena in self.arenas:
            heat[arena.layers, : arena.banks[0].experts] = arena.residency.heat / peak
        return {
            **{name: self.stats[name] for name in ("hits", "misses", "promotions")},
            "promoted_bytes": self.stats["promoted_bytes"],
            "layer_hits": self.uses[0].tolist(),
            "layer_routes": self.uses[1].tolist(),
            "resident": self.resident.tolist(),
            "tier": np.where(self.seats == EMPTY, 1, 0).tolist(),
            "heat": heat.round(3).tolist(),
            "check": self.check.report(),
        }

    def advance(self, limit: int) -> None:
        """Between two steps: enters what has arrived, then begins at most `limit` promotions."""
        if self._arrived():
            self._begin(self._choose(limit)[:limit])

    def _burst(self, limit: int) -> bool:
        """Between two steps: promotes for the last long ones, the faster the higher the limit;
        whether that is under way."""
        if not self._due and self._under_way <= MOVES:
            return False
        if not self._arrived():
            return True
        if self._tokens > SHORT_STEP:  # the next may be long as well, and need the bus itself
            return False
        at_once = min(BURST_BYTES, int(BURST_SECONDS * self.bus)) if self._bursts else 0
        room = min(self._due, at_once * limit // MOVES)
        moves = self._choose(room // min(arena.slab for arena in self.arenas), SURE)
        ends = np.cumsum([arena.slab for arena, _ in moves])
        count = int(np.searchsorted(ends, room, "right"))
        self._due -= int(ends[count - 1]) if count else self._due
        self._begin(moves[:count])
        return count > 0

    def _choose(self, limit: int, errors: float = 0.0) -> list[tuple[Arena, Move]]:
        """See `Residency.plan`, for each layout. They share the bus: those with most hits to gain
        for a byte go first."""
        moves = [(a, move) for a in self.arenas for move in a.residency.plan(limit, errors)]
        return sorted(moves, key=lambda found: found[1].gain / found[0].slab, reverse=True)

    def _arrived(self) -> bool:
        """Enters the promotions under way, if they have arrived; whether none is left."""
        if self._moving is None:
            return True
        event, moves = self._moving
        if event is not None and not event.query():
            return False
        for arena, move in moves:
            self._enter(arena, move)
        self.stats["promotions"] += len(moves)
        self.check.promoted(len(moves))
        self._moving = None
        self._publish()
        return True

    def _begin(self, moves: list[tuple[Arena, Move]]) -> None:
        if not moves:
            return
        for arena, move in moves:
            self._leave(arena, move.slot)
        self._publish()
        if not self._cuda:
            for arena, move in moves:
                self.stats["promoted_bytes"] += arena.copy(move)
            self._moving = None, moves
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the last readers of the slots
        with torch.cuda.stream(self._stream):
            for arena, move in moves:
                self.stats["promoted_bytes"] += arena.copy(move)
            event: Any = torch.cuda.Event
            done = event()
            done.record(self._stream)
        self._moving = done, moves


def _stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device) if device.type == "cuda" else None
