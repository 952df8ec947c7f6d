"""Long steps: a layer's experts come to the device over the bus, each just before it is needed.

Pages of a few experts are filled by a copy stream while those before are computed; when a layer
has nothing left to copy, the next layer's experts follow at once, so that the bus does not wait
for attention. Experts that have a slot are used from there. Knows nothing of routers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.demand import Demand
from greenroom.experts.errands import Errands
from greenroom.experts.limits import EXPERT_ROWS
from greenroom.experts.resident import DirectMlp
from greenroom.experts.ring import Page, Ring
from greenroom.experts.share import Share
from greenroom.experts.slabs import SlabLayout
from greenroom.kernels.carry import carry
from greenroom.kernels.dequantise import dequantise_group
from greenroom.kernels.expert_rows import activated_rows, add_rows, scaled_rows
from greenroom.kernels.grouped import BASE, GROUP, MOST, ORDER, PLACE, Group, Routes, product

NOBODY = -1  # no layer's index


class Resident(Protocol):
    """The slots of one layer, as far as a stream needs them."""

    memory: Tensor  # (slots, slab bytes) uint8

    def places(self) -> dict[int, int]:
        """Slot of each resident expert."""

    def count(self, uses: Sequence[int]) -> None:
        """Takes how often each expert was chosen."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What all layers share.

    Attributes:
        table: (4 * most experts of a layer,) int32 on the device, says who is computed when.
        scratch: (numbers,) float16 on the device, room for gate and up of one expert or more.
        used: experts of a token, where that is known.
        share: says what the CPU takes.
        errands: take it there and back.
        chunk: most tokens of a step, if known; room for as many rows is planned.
    """

    table: Tensor
    scratch: Tensor
    used: int
    share: Share
    errands: Errands
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's part of a step.

    Attributes:
        routes: of its tokens.
        half, scales: hidden states as `scaled_rows` gives them.
        out: (tokens, d) float32, the sum so far.
        rows: most of a pass.
    """

    routes: Routes
    half: Tensor
    scales: Tensor
    out: Tensor
    rows: int


class LayerStream:
    """Computes long steps of one layer on the device.

    Args:
        ring: shared by all layers; the layer joins it.
        cpu: where the slabs are.
        desk: shared by all layers.
        resident: this layer's slots, or None.
        before: the layer that is computed before this one, or None.
    """

    def __init__(
        self,
        ring: Ring,
        cpu: CpuExperts,
        desk: Desk,
        resident: Resident | None = None,
        before: "LayerStream | None" = None,
    ) -> None:
        self.ring, self.cpu, self.resident = ring, cpu, resident
        self._index = len(ring.banks)
        self._desk, self._demand = desk, Demand(cpu.experts)
        self._after: LayerStream | None = None
        if before is not None:
            before._after = self
        ring.banks.append(cpu)
        self._rows = GroupMlp(cpu.layout, cpu.activation, desk.scratch)
        self._most = min(MOST, ring.slabs, self._rows.most)
        pin, count = ring.cuda, cpu.experts
        self._table = torch.empty(4, count, dtype=torch.int32, pin_memory=pin)
        self._starts = torch.empty(count + 1, dtype=torch.int32, pin_memory=pin)
        event: Any = torch.cuda.Event
        self._counted = event() if ring.cuda else None

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `ExpertsBeside.__call__`; for steps of many tokens."""
        tokens = len(ids)
        table = self._desk.table[: self._table.numel()].view(self._table.shape)
        routes = Routes.sort(ids, weights, table)
        self._starts.copy_(routes.starts, non_blocking=True)
        if self._counted is not None:
            self._counted.record()
        hidden = hidden.contiguous()
        rows = min(EXPERT_ROWS, max(tokens, self._desk.chunk))
        step = Step(routes, *scaled_rows(hidden), torch.zeros_like(hidden), rows)
        self._desk.errands.settle()  # routes need its answer; a wait here leaves the processor free
        if self._counted is not None:
            self._counted.synchronize()
        sizes = np.diff(self._starts.numpy()).tolist()
        self._serve(step, sizes, hidden)
        if self.resident is not None:
            self.resident.count(sizes)
        return step.out

    def begin(self, tokens: int) -> None:
        """A step of so many tokens begins, and this is its first layer: pages of what it is likely
        to want set off before routes are known."""
        self.ring.begin()
        if self._after is None or self.ring.drop(self._index):
            return
        routes = tokens * self._desk.used
        absent, each = self.absent(), routes // self.cpu.experts
        lent = self._lend(absent, len(absent), [each] * self.cpu.experts)
        self._fill(deque(self._likely(routes, len(lent))))

    def abandon(self) -> None:
        """See `Stream.abandon`; what is staged is dropped, as short steps use its memory."""
        self._desk.errands.abandon()
        self.ring.drop(NOBODY)

    def _serve(self, step: Step, sizes: list[int], hidden: Tensor) -> None:
        """Decides who computes which experts, and has them computed. The CPU waits until it is
        told, so that comes first."""
        seats = {} if self.resident is None else self.resident.places()
        wanted = [e for e in range(self.cpu.experts) if sizes[e]]
        pages = [page.experts for page in self.ring.drop(self._index)]
        staged = {e for page in pages for e in page}
        absent = [e for e in wanted if e not in seats]
        waiting = [e for e in absent if e not in staged]
        lent = self._lend(waiting, len(absent), sizes)
        answer, away = self._send(step, hidden, lent) if lent else None, set(lent)
        queue = deque(self._pages([e for e in waiting if e not in away]))
        pages += [page for _, page in queue]
        self._fill(queue)
        plan = _Plan(self._table.numpy(), sizes, step.rows)
        here = [(e, seats[e]) for e in wanted if e in seats]
        free = self._rows.needs_no_scratch(sum(sizes[e] for e, _ in here), len(here))
        held = plan.groups(here, len(here) if free else self._most)
        kept = [
            plan.groups(
                [(e, i) for i, e in enumerate(page) if sizes[e] and e not in seats], self._most
            )
            for page in pages
        ]
        cpu = plan.whole(lent) if lent else None
        carry(self._table, step.routes.table)
        for group in held:
            assert self.resident is not None
            self._rows(step, group, self.resident.memory)
        self._demand.count(sizes)
        queue.extend(self._next(sum(sizes), len(lent)))
        for groups in kept:
            self._compute(step, groups)
            self._fill(queue)
        self._fill(queue)  # with all in slots or lent there were no pages
        if cpu is not None and answer is not None:
            self._desk.errands.meet()
            add_rows(step.out, answer, None, None, None, step.routes, cpu, 0)

    def _next(self, routes: int, lent: int) -> list[tuple[int, tuple[int, ...]]]:
        """Pages of the next layer. None of the last layer: of a prompt it computes one row, which
        needs few experts."""
        if self._after is None or self._after._after is None:
            return []
        return self._after._likely(routes, lent)

    def _likely(self, routes: int, lent: int) -> list[tuple[int, tuple[int, ...]]]:
        """Pages of what a step of so many routes is likely to want of this layer, but for experts
        to lend and as many more to choose from. While the bus would wait for routes, those it may
        want come, too."""
        absent, share = self.absent(), self._desk.share
        count = share.ahead(self._demand.expected(absent), lent)
        likely = self._demand.likely(absent, routes)[:count]
        idle = min(count, share.idle(routes, self.cpu.layout.nbytes)) - len(likely)
        perhaps = self._demand.perhaps(absent, routes)[: max(0, idle)]
        return self._pages(sorted(likely)) + self._pages(sorted(perhaps))

    def _compute(self, step: Step, groups: list[Group]) -> None:
        """The next page's groups."""
        page = self.ring.staged.popleft()
        self.ring.take(page)
        try:
            for group in groups:
                self._rows(step, group, self._slabs(page))
        finally:
            self.ring.give_back(page)

    def _slabs(self, page: Page) -> Tensor:
        """(experts, slab bytes) of a page."""
        size = self.cpu.layout.nbytes
        return page.data[: len(page.experts) * size].view(-1, size)

    def _pages(self, experts: list[int]) -> list[tuple[int, tuple[int, ...]]]:
        """This layer's pages of these experts, for the ring."""
        cuts = range(0, len(experts), self._most)
        return [(self._index, tuple(experts[i : i + self._most])) for i in cuts]

    def absent(self) -> list[int]:
        """Experts that have no slot."""
        seats = {} if self.resident is None else self.resident.places()
        return [e for e in range(self.cpu.experts) if e not in seats]

    def _lend(self, waiting: list[int], absent: int, sizes: list[int]) -> list[int]:
        """See `Share.lend`."""
        layout = self.cpu.layout
        weights = 3 * layout.d * layout.f
        return self._desk.share.lend(waiting, absent, sizes, layout.nbytes, weights)

    def _send(self, step: Step, hidden: Tensor, lent: list[int]) -> Tensor:
        """See `Errands.go`."""
        starts = self._starts.numpy()
        return self._desk.errands.go(self._index, hidden, step.routes.tokens, starts, lent)

    def _fill(self, queue: deque[tuple[int, tuple[int, ...]]]) -> None:
        while queue and self.ring.room:
            self.ring.fetch(*queue.popleft())


class _Plan:
    """Cuts experts into groups and writes the table of `Routes`.

    Args:
        table: (4, experts) int32, to be filled.
        sizes: rows of each expert.
        rows: of a group, unless a single expert has more.
    """

    def __init__(self, table: NDArray[np.int32], sizes: list[int], rows: int) -> None:
        self._table, self._sizes, self._rows = table, sizes, rows
        self._entries = self._count = 0
        table[:] = 0
        table[GROUP] = -1

    def groups(self, entries: list[tuple[int, int]], most: int) -> list[Group]:
        """Groups of at most so many (expert, index of its slab)."""
        found: list[Group] = []
        part: list[tuple[int, int]] = []
        rows = 0
        for entry in entries:
            size = self._sizes[entry[0]]
            if part and (len(part) == most or rows + size > self._rows):
                found.append(self._enter(part))
                part, rows = [], 0
            part.append(entry)
            rows += size
        return [*found, self._enter(part)] if part else found

    def whole(self, experts: list[int]) -> Group:
        """One group of them all, of which only the sum is left to do."""
        return self._enter([(e, 0) for e in experts])

    def _enter(self, entries: list[tuple[int, int]]) -> Group:
        first, base = self._entries, 0
        for i, (expert, place) in enumerate(entries):
            self._table[ORDER, first + i] = expert
            self._table[BASE, expert], self._table[PLACE, expert] = base, place
            self._table[GROUP, expert] = self._count
            base += self._sizes[expert]
        self._entries += len(entries)
        self._count += 1
        return Group(self._count - 1, first, tuple(self._sizes[e] for e, _ in entries))


class GroupMlp:
    """The MLPs of a group of experts from their slabs, for many tokens.

    Weights become float16, rows scaled by powers of two so that nothing overflows, and sums are
    float32: eleven bits of both factors, as many as TF32 keeps. They are expanded in memory where
    experts have many rows.

    Args:
        layout: of the slabs.
        activation: "silu" or "gpt-oss".
        scratch: (numbers,) float16, at least 2 * d * f.
    """

    def __init__(self, layout: SlabLayout, activation: str, scratch: Tensor) -> None:
        self._layout = layout
        self._activation = activation
        self._scratch = scratch
        self._direct = DirectMlp(layout, activation)
        self.most = scratch.numel() // (2 * layout.d * layout.f)  # experts of a group

    def needs_no_scratch(self, rows: int, experts: int) -> bool:
        """Whether so many rows of so many experts are multiplied from their blocks."""
        return self._direct.takes(rows, experts)

    def __call__(self, step: Step, group: Group, slabs: Tensor) -> None:
        """Adds the group's share to step.out; slabs: (slabs, bytes) uint8 on the device."""
        # One part of many experts may have more rows each than all of them on average.
        direct = len(group.counts) > self.most
        direct = direct or self.needs_no_scratch(group.rows, len(group.counts))
        for skip in range(0, group.rows, step.rows):
            rows = min(step.rows, group.rows - skip)
            if direct:
                parts = step.half, step.scales, step.out
                self._direct(slabs, step.routes, group, *parts, skip, rows)
            else:
                self._some(step, group, skip, rows, slabs)

    def _some(self, step: Step, group: Group, skip: int, rows: int, slabs: Tensor) -> None:
        routes = step.routes
        gate, up, down = (None, None, None) if (b := self._layout.biases) is None else b
        biases = None if gate is None or up is None else (gate[0], up[0])
        weights = self._gate_up(slabs, routes, group)
        both = product(step.half, weights, routes, group, skip, rows, gather=True)
        inner, scales = activated_rows(
            both, slabs, biases, step.scales, routes, group, skip, self._activation
        )
        del both  # large: its room is that of y
        f, d, n = self._layout.f, self._layout.d, len(group.counts)
        last = self._matrix(
            slabs, 2, self._scratch[: n * d * f].view(n, d, f), routes, group
        )  # over gate and up, which have been read
        y = product(inner, last, routes, group, skip, rows, gather=False)
        bias = None if down is None else down[0]
        add_rows(step.out, y, scales, slabs, bias, routes, group, skip)

    def _gate_up(self, slabs: Tensor, routes: Routes, group: Group) -> Tensor:
        f, d, n = self._layout.f, self._layout.d, len(group.counts)
        both = self._scratch[: 2 * n * f * d].view(n, 2 * f, d)
        if self._layout.joined:
            return self._matrix(slabs, 0, both, routes, group)
        self._matrix(slabs, 0, both[:, :f], routes, group)
        self._matrix(slabs, 1, both[:, f:], routes, group)
        return both

    def _matrix(
        self, slabs: Tensor, index: int, out: Tensor, routes: Routes, group: Group
    ) -> Tensor:
        start, kind = self._layout.matrices[index][0], int(self._layout.types[index])
        return dequantise_group(slabs, start, kind, out, routes, group)
