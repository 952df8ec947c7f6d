"""Long steps: a layer's experts come to the device over the bus, each just before it is needed.

A ring of staging slabs is filled by a copy stream while the experts before are computed; when a
layer has nothing left to copy, the next layer's experts follow at once, so that the bus does not
wait for attention. Experts that have a slot are used from there. Knows nothing of routers.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.slabs import SlabLayout
from greenroom.kernels.dequantise import dequantise
from greenroom.kernels.expert_rows import activated_rows, add_rows, scaled_rows

ROWS = 4096  # of one expert computed at a time; bounds scratch
# Rates that share a layer between bus and CPU. Constants, because a choice by the clock would give
# another text every time: the CPU rounds otherwise than the GPU. Measured on an H100 host.
BUS = 50e9  # bytes per second
THREAD_BYTES = 6e9  # of weights per second and thread
THREAD_OPERATIONS = 0.15e12  # per second and thread, AVX-512
COVERAGE = 0.9  # share of a layer's experts that must be in demand to copy before it is known


class Resident(Protocol):
    """The slots of one layer, as far as a stream needs them."""

    memory: Tensor  # (slots, slab bytes) uint8

    def places(self) -> dict[int, int]:
        """Slot of each resident expert."""

    def count(self, uses: Sequence[int]) -> None:
        """Takes how often each expert was chosen."""


@dataclass(slots=True)
class _Staged:
    """One slab of the ring.

    Attributes:
        data: (bytes of the largest slab,) uint8 on the device.
        ready: recorded when the copy into it is done, on the copy stream.
        used: recorded when its last reader is done.
    """

    data: Tensor
    ready: Any
    used: Any


class Ring:
    """Staging slabs and the stream that fills them; one for all layers.

    Args:
        memory: (slabs, bytes) uint8 on the device, at least two slabs.
    """

    def __init__(self, memory: Tensor) -> None:
        self.cuda = memory.is_cuda
        self.layers: list[LayerStream] = []
        event: Any = torch.cuda.Event if self.cuda else lambda: None
        stream: Any = torch.cuda.Stream
        self._stream: Any = stream(memory.device) if self.cuda else None
        self._free = deque(_Staged(row, event(), event()) for row in memory)
        self.staged: deque[tuple[int, int, _Staged]] = deque()  # layer, expert, where
        self.copied_bytes = 0

    @property
    def room(self) -> bool:
        return bool(self._free)

    def fetch(self, layer: int, expert: int) -> None:
        """Begins the copy of one expert; there must be room."""
        source = torch.from_numpy(self.layers[layer].cpu.slab(expert))
        slab = self._free.popleft()
        target = slab.data[: source.numel()]
        if self.cuda:
            self._stream.wait_event(slab.used)
        with torch.cuda.stream(self._stream) if self.cuda else nullcontext():
            target.copy_(source, non_blocking=True)
            if self.cuda:
                slab.ready.record(self._stream)
        self.staged.append((layer, expert, slab))
        self.copied_bytes += target.numel()

    def take(self, slab: _Staged) -> None:
        """Makes what is computed from now on wait for the slab's copy."""
        if self.cuda:
            slab.ready.wait()

    def give_back(self, slab: _Staged) -> None:
        """The slab's readers have all been given to the device."""
        if self.cuda:
            slab.used.record()
        self._free.append(slab)

    def drop(self, layer: int, wanted: set[int]) -> list[int]:
        """Frees what is staged and neither of this layer nor wanted; returns what stays."""
        kept: deque[tuple[int, int, _Staged]] = deque()
        for entry in self.staged:
            if entry[0] == layer and entry[1] in wanted:
                kept.append(entry)
            else:
                self.take(entry[2])  # so that "used" also covers the copy
                self.give_back(entry[2])
        self.staged = kept
        return [expert for _, expert, _ in kept]


class LayerStream:
    """Computes long steps of one layer on the device.

    Args:
        ring: shared by all layers; the layer joins it.
        cpu: where the slabs are.
        scratch: (numbers,) float16 on the device, room for gate and up of one expert.
        resident: this layer's slots, or None.
    """

    def __init__(
        self, ring: Ring, cpu: CpuExperts, scratch: Tensor, resident: Resident | None = None
    ) -> None:
        self.ring, self.cpu, self.resident = ring, cpu, resident
        self._index = len(ring.layers)
        self._scratch = scratch
        self._rows = Expert(cpu.layout, cpu.activation, scratch)
        ring.layers.append(self)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `ExpertsBeside.__call__`; for steps of many tokens."""
        k = ids.shape[1]
        routed, order = torch.sort(ids.view(-1), stable=True)
        edges = torch.arange(self.cpu.experts + 1, dtype=ids.dtype, device=ids.device)
        starts = torch.searchsorted(routed, edges).tolist()  # waits for the device
        work = Work.prepare(hidden, order // k, weights.contiguous().view(-1)[order], starts)
        seats = {} if self.resident is None else self.resident.places()
        if self.resident is not None:
            self.resident.count([starts[e + 1] - starts[e] for e in range(self.cpu.experts)])
        wanted = [e for e in range(self.cpu.experts) if starts[e + 1] > starts[e]]
        absent = [e for e in wanted if e not in seats]
        here = self.ring.drop(self._index, set(absent))
        waiting = [e for e in absent if e not in set(here)]
        lent = self._lend(waiting, starts)
        waiting = [e for e in waiting if e not in set(lent)]
        absent = [*here, *waiting]
        queue = deque((self._index, e) for e in waiting)
        share = 1 - (1 - k / self.cpu.experts) ** hidden.shape[0]
        if share >= COVERAGE and self._index + 1 < len(self.ring.layers):
            queue.extend(self.ring.layers[self._index + 1].absent())
        self._fill(queue)
        if lent:
            self._send(work, hidden, lent)
        for expert in wanted:
            if expert in seats:
                assert self.resident is not None
                self._rows(work, expert, self.resident.memory[seats[expert]])
        for _ in absent:
            _, expert, slab = self.ring.staged.popleft()
            self.ring.take(slab)
            self._rows(work, expert, slab.data)
            self.ring.give_back(slab)
            self._fill(queue)
        if lent:
            self._receive(work, lent)
        return work.out

    def _lend(self, waiting: list[int], starts: list[int]) -> list[int]:
        """Which of the experts to be copied the CPU computes meanwhile: those with the fewest
        tokens, as many as leave both ready at the same time.
        """
        layout, threads = self.cpu.layout, self.cpu.threads
        lent: list[int] = []
        busy, copying = 0.0, len(waiting) * layout.nbytes / BUS
        for expert in sorted(waiting, key=lambda e: starts[e + 1] - starts[e]):
            operations = 6 * (starts[expert + 1] - starts[expert]) * layout.d * layout.f
            reading = layout.nbytes / (THREAD_BYTES * threads)
            busy += max(reading, operations / (THREAD_OPERATIONS * threads))
            copying -= layout.nbytes / BUS
            if busy > copying:
                break
            lent.append(expert)
        return sorted(lent)

    def _send(self, work: "Work", hidden: Tensor, lent: list[int]) -> None:
        """Has the CPU begin the lent experts' routes, a row each."""
        rows = torch.cat([work.tokens[work.starts[e] : work.starts[e + 1]] for e in lent])
        there = hidden.index_select(0, rows).cpu()  # waits for the gathering only
        counts = torch.tensor([work.starts[e + 1] - work.starts[e] for e in lent])
        ids = torch.repeat_interleave(torch.tensor(lent, dtype=torch.int32), counts)[:, None]
        self.cpu.submit(there, ids, torch.ones(len(ids), 1))

    def _receive(self, work: "Work", lent: list[int]) -> None:
        """Adds what the CPU computed, expert by expert: always the same sum."""
        found = self.cpu.wait().to(work.out.device)
        ones, row = torch.ones(len(found), device=work.out.device), 0
        for expert in lent:
            start, stop = work.starts[expert], work.starts[expert + 1]
            part = found[row : row + stop - start]
            tokens, weights = work.tokens[start:stop], work.weights[start:stop]
            add_rows(work.out, part, tokens, weights, ones, None)
            row += stop - start

    def absent(self) -> list[tuple[int, int]]:
        """(layer, expert) of all that have no slot."""
        seats = {} if self.resident is None else self.resident.places()
        return [(self._index, e) for e in range(self.cpu.experts) if e not in seats]

    def _fill(self, queue: deque[tuple[int, int]]) -> None:
        while queue and self.ring.room:
            self.ring.fetch(*queue.popleft())


@dataclass(frozen=True, slots=True)
class Work:
    """A step's rows, sorted by expert.

    Attributes:
        half, scales: hidden states as `scaled_rows` gives them.
        tokens: (tokens * k,) int64, whose row it is.
        weights: (tokens * k,) float32.
        starts: first row of each expert, and the end.
        out: (tokens, d) float32, the sum so far.
    """

    half: Tensor
    scales: Tensor
    tokens: Tensor
    weights: Tensor
    starts: list[int]
    out: Tensor

    @staticmethod
    def prepare(hidden: Tensor, tokens: Tensor, weights: Tensor, starts: list[int]) -> "Work":
        """Of hidden (tokens, d) float32 and the sorted routes."""
        hidden = hidden.contiguous()
        half, scales = scaled_rows(hidden)
        return Work(half, scales, tokens, weights, starts, torch.zeros_like(hidden))


class Expert:
    """The MLP of one expert from its slab, for many tokens.

    Weights are expanded to float16, rows scaled by powers of two so that nothing overflows, and
    sums are float32: eleven bits of both factors, as many as TF32 keeps.

    Args:
        layout: of the slab.
        activation: "silu" or "gpt-oss".
        scratch: (numbers,) float16, at least 2 * d * f.
    """

    def __init__(self, layout: SlabLayout, activation: str, scratch: Tensor) -> None:
        self._layout = layout
        self._activation = activation
        self._scratch = scratch

    def __call__(self, work: Work, expert: int, slab: Tensor) -> None:
        """Adds the expert's share to work.out; slab: (bytes,) uint8 on the device."""
        for start in range(work.starts[expert], work.starts[expert + 1], ROWS):
            self._some(work, start, min(start + ROWS, work.starts[expert + 1]), slab)

    def _some(self, work: Work, start: int, stop: int, slab: Tensor) -> None:
        f, d = self._layout.f, self._layout.d
        tokens = work.tokens[start:stop]
        both = product(work.half.index_select(0, tokens), self._gate_up(slab))
        gate_bias, up_bias, down_bias = (self._bias(slab, i) for i in range(3))
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        inner, scales = activated_rows(
            both[:, :f], both[:, f:], biases, work.scales, tokens, self._activation
        )
        down = self._matrix(slab, 2, self._scratch[: d * f].view(d, f))
        y = product(inner, down)
        add_rows(work.out, y, tokens, work.weights[start:stop], scales, down_bias)

    def _gate_up(self, slab: Tensor) -> Tensor:
        f, d = self._layout.f, self._layout.d
        both = self._scratch[: 2 * f * d].view(2 * f, d)
        gate, up = self._layout.matrices[:2]
        if self._layout.types[0] == self._layout.types[1] and gate[1] == up[0] and f % 16 == 0:
            return self._matrix(slab, 0, both)  # up's groups of rows follow gate's
        self._matrix(slab, 0, both[:f])
        self._matrix(slab, 1, both[f:])
        return both

    def _matrix(self, slab: Tensor, index: int, out: Tensor) -> Tensor:
        start = self._layout.matrices[index][0]
        return dequantise(slab[start:], int(self._layout.types[index]), out)

    def _bias(self, slab: Tensor, index: int) -> Tensor | None:
        if self._layout.biases is None:
            return None
        start, stop = self._layout.biases[index]
        return slab[start:stop].view(torch.float32)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, cols) times the transpose of weight (n, cols), both float16: (rows, n) float32."""
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T
