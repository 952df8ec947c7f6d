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

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.residency import EMPTY, Move, Residency
from greenroom.experts.resident import ResidentMlp
from greenroom.experts.selfcheck import SelfCheck
from greenroom.experts.slabs import SlabLayout
from greenroom.experts.uselog import SEEN, Account, Seen, UseLog
from greenroom.kernels.experts import hits
from greenroom.kernels.guests import Guests
from greenroom.kernels.planes import Cutter
from greenroom.kernels.sorting import by_expert

EVERY = 4  # steps between promotions


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


class Arena:
    """The slots of all layers with one layout.

    Args:
        account: where the memory is booked.
        layers: indices of the layers among all.
        banks: the slabs of each.
        count: slots.
    """

    def __init__(
        self, account: Account, layers: list[int], banks: list[CpuExperts], count: int
    ) -> None:
        self.layers, self.banks = layers, banks
        self._account = account
        self.slab = banks[0].layout.nbytes  # bytes of a slot
        self.memory = account.empty("slots", [count, self.slab], torch.uint8)
        self.residency = Residency(len(layers), banks[0].experts, count)

    def shrink(self) -> int:
        """Gives half of the slots back, but not the last; returns the bytes.

        The rest is allocated anew and filled again: part of a tensor cannot be freed.
        """
        count, slab = self.memory.shape
        if count < 2:
            return 0
        kept, device = count // 2, self._account.device
        self.memory = torch.empty(0, slab, dtype=torch.uint8, device=device)
        self._account.release("slots", count * slab)
        torch.cuda.empty_cache()  # nothing happens where CUDA is not in use
        try:
            self.memory = self._account.empty("slots", [kept, slab], torch.uint8)
        except torch.OutOfMemoryError:  # somebody was faster
            self._account.release("slots", kept * slab)
            kept = 0
        self.residency.shrink(kept)
        for move in self.residency.held:
            self.copy(move)
        return int((count - kept) * slab)

    def copy(self, move: Move) -> int:
        """Begins the copy of one slab; returns its bytes."""
        source = torch.from_numpy(self.banks[move.layer].slab(move.expert))
        self.memory[move.slot].copy_(source, non_blocking=True)
        return source.numel()


class Slots:
    """All slots of a model.

    Args:
        account: where memory is booked.
        banks: the slabs of each MoE layer.
        nbytes: memory for slots; what is left over is less than one slab per layout.
        heat: (layers, experts), how much each expert is in demand; None if nothing is known.
        chunk: most tokens of a step, if known.
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
        self._copying = False, False  # beside the last step, and beside this one
        self._cuda = account.device.type == "cuda"
        self._stream: Any = _stream(account.device)
        self._moving: tuple[Any, list[tuple[Arena, Move]]] | None = None
        self.arenas = _arenas(account, banks, nbytes)
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
        self.observe(self.log.take())
        if 0 < self._tokens * self.log.k <= SEEN:
            hits, misses = (self.stats[name] - self._before[name] for name in ("hits", "misses"))
            self.check.step(self._tokens, seconds, hits, misses, self._copying[0])
        self._before, self._tokens = self.stats.copy(), tokens
        self.log.read(tokens)
        self._steps += 1
        if self._used != self.check.using:
            self._used = self.check.using
            self._publish()
        if self._steps % EVERY == 0:
            self.advance(self.check.moves if self._used else 0)
        self._copying = self._copying[1], self._moving is not None

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
        if self._moving is not None:
            event, moves = self._moving
            if event is not None and not event.query():
                return
            for arena, move in moves:
                self._enter(arena, move)
            self.stats["promotions"] += len(moves)
            self.check.promoted(len(moves))
            self._moving = None
            self._publish()
        moves = [(arena, move) for arena in self.arenas for move in arena.residency.plan(limit)]
        if moves:  # layouts share the bus: those with most hits to gain for a byte go first
            moves.sort(key=lambda found: found[1].gain / found[0].slab, reverse=True)
            self._begin(moves[:limit])

    def _begin(self, moves: list[tuple[Arena, Move]]) -> None:
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


def _arenas(account: Account, banks: Sequence[CpuExperts], nbytes: int) -> list[Arena]:
    """One per layout; each gets the share of the memory that its experts have of all."""
    groups: dict[tuple[SlabLayout, int, str], list[int]] = {}
    for i, bank in enumerate(banks):
        groups.setdefault((bank.layout, bank.experts, bank.activation), []).append(i)
    total = sum(bank.layout.nbytes * bank.experts for bank in banks)
    if nbytes < total:  # what is beside the slots comes out of the same bytes
        nbytes = max(0, nbytes - 4 * len(banks) * (SEEN + max(bank.experts for bank in banks)))
    arenas = []
    for (layout, experts, _), layers in groups.items():
        own = layout.nbytes * experts * len(layers)
        count = min(nbytes * own // total // layout.nbytes, experts * len(layers))
        if count > 0:
            arenas.append(Arena(account, layers, [banks[i] for i in layers], count))
    return arenas
