"""The cuda backend: dense parts and the KV cache on a GPU through Triton kernels, routed experts
and the embedding table in RAM. Knows no family.

On the device "cpu" the same code runs under Triton's interpreter, for tests.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from greenroom.experts.beside import Courier, ExpertsBeside
from greenroom.experts.rendezvous import courier_for
from greenroom.experts.shelf import Shelf
from greenroom.experts.tiers import Tiers
from greenroom.kernels.attention import PREFILL_ROWS, ROWS, attend, tiles
from greenroom.kernels.rope import enter
from greenroom.layers.backend import (
    AttentionSpec,
    ExpertWeights,
    Graphs,
    Step,
)
from greenroom.layers.batch import Batch, KVCache
from greenroom.layers.device_embedding import DeviceEmbedding
from greenroom.layers.device_parts import (
    DeviceMatrices,
    DeviceMatrix,
    DeviceMlp,
    DeviceNorm,
    Workbench,
    to_device,
)
from greenroom.layers.device_router import DeviceRouter
from greenroom.layers.native_backend import cpu_experts
from greenroom.layers.rope import Rope
from greenroom.layers.router import Rule
from greenroom.layers.weight import Weight

SPLIT_KEYS = 256  # keys a program should read at least before a sequence is split further
MOST_SPLITS = 32
PROGRAMS = 264  # two per multiprocessor of the largest GPUs: enough to keep memory busy


@dataclass(frozen=True, slots=True)
class DeviceStep(Step):
    """A step whose addresses are on the device.

    Attributes:
        positions: (tokens,) int64.
        tables, slots: of each KV group, see `KVGroup`.
        query_starts, contexts: (sequences + 1,) and (sequences,) int32.
        longest: largest context.
        tiles: of the attention by rows per tile, (sequences, first rows), filled when asked.
        frequencies: (rotated / 2,) float32 or None.
    """

    positions: Tensor
    tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    query_starts: Tensor
    contexts: Tensor
    longest: int
    tiles: tuple[Tensor, Tensor]
    rows: int
    frequencies: Tensor | None


class CudaBackend:
    """Dense parts on a device, experts in RAM.

    Args:
        pool: the native thread pool; computes the experts.
        bench: books memory and lends scratch.
        heads_per_kv: query heads that share a key-value head.
        mmap: leave embedding rows and experts in the mapped file until they are used.
        shelf: experts of an earlier model on the same file.
    """

    tier = ".vram"

    def __init__(
        self,
        pool: Any,
        bench: Workbench,
        heads_per_kv: int,
        mmap: bool = False,
        courier: Courier | None = None,
        tiers: Tiers | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.pool = pool
        self.shelf = shelf
        self.bench = bench
        self.device = bench.device
        self.mmap = mmap
        self._least_rows = max(ROWS, triton.next_power_of_2(heads_per_kv))
        self._heads_per_kv = heads_per_kv
        self.tiers = tiers or Tiers(bench.ledger)
        self._courier: Courier = courier or courier_for(self.device, lazy=mmap)
        self._beside: list[ExpertsBeside] = []
        self._frequencies: tuple[Rope, Tensor] | None = None

    @property
    def booked(self) -> int:
        """Bytes on the device that stay allocated."""
        return self.bench.ledger.used

    def embedding(self, weight: Weight) -> DeviceEmbedding:
        """The table stays in RAM."""
        return DeviceEmbedding(weight, self.device, None if self.mmap else self.pool)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> DeviceMatrix:
        """See `Backend.linear`."""
        return DeviceMatrix(self.bench, [weight], [bias])

    def linears(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> DeviceMatrices:
        """See `Backend.linears`."""
        return DeviceMatrices(self.bench, weights, biases)

    def norm(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> DeviceNorm:
        """See `Backend.norm`."""
        return DeviceNorm(self.bench.ledger, weight, bias, eps, centred, self.bench.cut)

    def router(self, weight: Tensor, bias: Tensor | None, rule: Rule) -> DeviceRouter:
        """See `Backend.router`.

        SparseMixer's weights jump by half of an expert at a threshold, so that rounding to TF32
        before it costs next tokens: 4 of 418 differed on an H100 (random weights), 1 or 2 without.
        """
        self.bench.exact |= rule.gating == "sparse_mixer"
        place = self.bench.ledger.place
        there = None if bias is None else place("dense", bias)
        return DeviceRouter(place("dense", weight), there, rule)

    def mlp(self, gate: Weight, up: Weight, down: Weight) -> DeviceMlp:
        """See `Backend.mlp`."""
        return DeviceMlp(self.bench, gate, up, down)

    def experts(self, weights: ExpertWeights) -> ExpertsBeside:
        """See `Backend.experts`."""
        cpu = cpu_experts(self.pool, weights, self.mmap, self.shelf)
        beside = ExpertsBeside(cpu, self._courier)
        self._beside.append(beside)
        self.tiers.add(beside)
        return beside

    def complete(self) -> None:
        """See `Backend.complete`."""
        self.tiers.complete()
        self._share_cuts()

    def _share_cuts(self) -> None:
        for beside in self._beside:
            for part in (beside.slots, beside.bus):
                if part is not None:
                    part.cut = self.bench.cut

    def rehearse(self) -> None:
        """See `Backend.rehearse`."""
        self.tiers.rehearse()
        self._share_cuts()

    def step_done(self, tokens: int, seconds: float = 0.0) -> None:
        """Sees a long step's CPU part done and promotes experts, see `Slots.step_done`."""
        self.tiers.settle()
        if self.tiers.slots is not None:
            self.tiers.slots.step_done(tokens, seconds)

    def relieve(self) -> int:
        """See `Tiers.relieve`."""
        return self.tiers.relieve()

    def expert_stats(self) -> dict[str, Any]:
        """See `Tiers.report`."""
        return self.tiers.report()

    def recording(self) -> AbstractContextManager[None]:
        """See `Courier.recording`."""
        return self._courier.recording([b.cpu for b in self._beside if b.crosses])

    def answering(self, tokens: int) -> AbstractContextManager[None]:
        """See `Courier.answering`."""
        return self._courier.answering(tokens)

    def graphs(self, rope: Rope | None) -> Graphs | None:
        """See `Backend.graphs`."""
        if self.device.type != "cuda":
            return None
        from greenroom.layers.decode_graphs import DecodeGraphs  # it needs this module

        return DecodeGraphs(self, rope)

    def place(self, tensor: Tensor) -> Tensor:
        """See `Backend.place`."""
        return self.bench.ledger.place("dense", tensor)

    def bring(self, x: Tensor) -> Tensor:
        """See `Backend.bring`."""
        mine, there = self.device, x.device  # "cuda" is any GPU, as tensors are on "cuda:0"
        if there.type == mine.type and mine.index in (None, there.index):
            return x
        return to_device(x.contiguous(), mine)

    def cache(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Backend.cache`."""
        ledger = self.bench.ledger
        memory = ledger.empty("cache", shape, dtype).zero_()
        weakref.finalize(memory, ledger.release, "cache", memory.nbytes)
        return memory

    def step(self, batch: Batch, rope: Rope | None) -> DeviceStep:
        """Copies what layers need of a batch to the device at once."""
        starts = batch.query_starts.tolist()
        decoding = len(starts) - 1 == starts[-1]
        rows = self._least_rows if decoding else max(PREFILL_ROWS, self._least_rows)
        cut = [torch.tensor(t, dtype=torch.int32) for t in tiles(starts, self._heads_per_kv, rows)]
        groups = batch.groups
        there = upload(
            [
                batch.positions, batch.query_starts, batch.context_lengths, *cut,
                *(group.block_tables for group in groups), *(group.slots for group in groups),
            ],
            self.device,
        )  # fmt: skip
        self.tiers.begin(len(batch.tokens))  # behind the upload on the bus
        return DeviceStep(
            batch=batch,
            rope=rope,
            angles=None,
            positions=there[0],
            query_starts=there[1],
            contexts=there[2],
            tiles=(there[3], there[4]),
            tables=tuple(there[5 : 5 + len(groups)]),
            slots=tuple(there[5 + len(groups) :]),
            longest=int(batch.context_lengths.max()),
            rows=rows,
            frequencies=None if rope is None else self._table(rope),
        )

    def _table(self, rope: Rope) -> Tensor:
        if self._frequencies is None or self._frequencies[0] is not rope:
            self._frequencies = rope, rope.frequencies.to(self.device)
        return self._frequencies[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, step: Step, spec: AttentionSpec
    ) -> Tensor:
        """See `Backend.attend`."""
        assert isinstance(step, DeviceStep)
        turn = (1.0, True) if step.rope is None else (step.rope.magnitude, step.rope.neox)
        norms = rms_norms(spec)
        if norms is None:
            q, k = spec.normed(q, k)
        slots = step.slots[spec.group]
        enter(q, k, v, slots, cache.k, cache.v, step.positions, step.frequencies, *turn, norms)
        return attend(
            q,
            cache.k,
            cache.v,
            step.tables[spec.group],
            step.query_starts,
            step.contexts,
            *step.tiles,
            scale=spec.scale,
            rows=step.rows,
            splits=splits(step, k.shape[1], spec.window),
            window=spec.window,
            sinks=spec.sinks,
        )


def rms_norms(spec: AttentionSpec) -> tuple[Tensor, Tensor, float] | None:
    """Weights and epsilon of the heads' norms, if they are such as `enter` takes along."""
    first, second = spec.head_norms or (None, None)
    if not isinstance(first, DeviceNorm) or not isinstance(second, DeviceNorm):
        return None
    both = first.weight, second.weight, first.eps
    return both if first.rms and second.rms and first.eps == second.eps else None


def splits(step: DeviceStep, kv_heads: int, window: int | None) -> int:
    """Programs over which the keys of a sequence are spread: a power of two."""
    keys = step.longest if window is None else min(step.longest, window)
    wanted = min(keys // SPLIT_KEYS, PROGRAMS // (len(step.tiles[0]) * kv_heads), MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def upload(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tensors in RAM to the device in one piece; shapes and types stay.

    A step has about ten small ones, and every copy command costs several microseconds.
    """
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + -(-part.nbytes // 16) * 16)
    buffer = torch.empty(ends[-1], dtype=torch.uint8)
    for part, start in zip(parts, ends, strict=False):
        buffer[start : start + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    there = to_device(buffer, device)
    return [
        there[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for part, start in zip(parts, ends, strict=False)
    ]
