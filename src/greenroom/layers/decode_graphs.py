"""Decode steps as CUDA graphs: recorded once per number of sequences and range of contexts, then
replayed with new inputs in the same memory, without a launch per kernel.

Only steps in which the host never waits can be recorded; experts on the CPU are met through
memory both processors see. A new graph must give the logits of the plain step it was recorded
from; otherwise graphs are given up. Knows no family.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.experts.limits import SHORT_STEP
from greenroom.layers.backend import Compute, Start
from greenroom.layers.batch import Batch, KVCache, KVGroup, Launched
from greenroom.layers.choice import UNDECIDED, likeliest
from greenroom.layers.cuda_backend import CudaBackend, DeviceStep
from greenroom.layers.device_parts import to_device
from greenroom.layers.rope import Rope
from greenroom.layers.staging import Staging

MOST_SEQUENCES = SHORT_STEP  # longer steps stream experts, where launches no longer matter
USES = 3  # of a kind of step before it is recorded: odd ones are not worth it
KEPT = 8  # graphs; every one holds memory of the driver's
FIRST_RANGE, RANGE_FACTOR = 512, 4  # contexts up to 512, 2048, 8192, ...
CLOSE = 1e-2  # of the largest logit: a replay may differ from the plain step by so much

log = logging.getLogger(__name__)


def context_range(longest: int) -> int:
    """The upper end of the range of contexts a step belongs to."""
    end = FIRST_RANGE
    while end < longest:
        end *= RANGE_FACTOR
    return end


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token and wants its logits."""
    tokens = batch.tokens.shape
    return tokens == batch.context_lengths.shape == batch.output_rows.shape


def widened(batch: Batch, blocks: int) -> Batch:
    """The batch with block tables (sequences, blocks), filled up with -1."""
    groups = []
    for group in batch.groups:
        table = torch.full((len(batch.tokens), blocks), -1, dtype=torch.int32)
        width = min(blocks, group.block_tables.shape[1])
        table[:, :width] = group.block_tables[:, :width]
        groups.append(KVGroup(table, group.slots))
    return replace(batch, groups=tuple(groups))


@dataclass(slots=True)
class Recorded:
    """A graph and the memory it reads and writes.

    Attributes:
        inputs: of the step: `first_input`, then `addresses_of`.
        step: read by the graph too: what is the same in every step of its kind lies only here.
        logits, likeliest: what a replay leaves, see `Launched`, or what `Compute` gives instead
            of logits; it also begins with the likeliest of the last one where its tokens are
            negative.
        ahead: the batch whose addresses are in `inputs` already, or None.
    """

    graph: Any
    inputs: Staging
    step: DeviceStep
    logits: Tensor
    likeliest: Tensor
    ahead: Batch | None = None


def first_input(start: Start, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
    """Tokens (n,) int64 where the device looks up their rows by itself, else the rows (n, d)."""
    return batch.tokens if start.reads else start.rows(batch, caches)


def addresses_of(batch: Batch) -> list[Tensor]:
    """What differs from step to step beside embeddings, in RAM."""
    groups = batch.groups
    tables, slots = [g.block_tables for g in groups], [g.slots for g in groups]
    return [batch.positions, batch.context_lengths, *tables, *slots]


def fill(places: Sequence[NDArray[Any]], values: Sequence[Tensor]) -> None:
    """Writes inputs; block tables may be narrower than their place and are filled up with -1."""
    for place, value in zip(places, values, strict=True):
        if place.ndim == 2 and (width := value.shape[1]) < place.shape[1]:
            place[:, :width] = value.numpy()
            place[:, width:] = -1
        else:
            place[...] = value.numpy()


class DecodeGraphs:
    """The recorded steps of one model.

    Args:
        backend: computes what follows a step's `Start`.
        rope: the model's.
    """

    def __init__(self, backend: CudaBackend, rope: Rope | None) -> None:
        self._backend, self._rope = backend, rope
        self._graphs: OrderedDict[tuple[int, int], Recorded] = OrderedDict()
        self._uses: dict[tuple[int, int], int] = {}
        self._caches: Sequence[KVCache] | None = None  # whose addresses the graphs hold
        self._pool: Any = None
        self.usable = backend.device.type == "cuda"

    def __call__(
        self, batch: Batch, caches: Sequence[KVCache], start: Start, compute: Compute
    ) -> Tensor | None:
        """See `Graphs.__call__`; the memory of the result is used again by the next call."""
        replayed = self.replay(batch, caches, start)
        if replayed is not None:
            with replayed.answering:
                return replayed.logits
        if not self._takes(batch):
            return None
        key = _kind(batch)
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] < USES:
            return None
        wide = widened(batch, -(-key[1] // caches[0].k.shape[2]))
        rows = start.rows(batch, caches)
        return self._record(key, start, rows, wide, partial(compute, caches=caches))

    def replay(
        self,
        batch: Batch,
        caches: Sequence[KVCache],
        start: Start,
        chosen: Tensor | None = None,
    ) -> Launched | None:
        """See `Graphs.replay`."""
        known = self._known(batch, caches)
        if known is None:
            return None
        inputs = known.inputs
        if chosen is None:
            inputs.here[0][...] = first_input(start, batch, caches).numpy()
        else:
            inputs.here[0][...] = UNDECIDED
            if chosen is not known.likeliest:  # drawn, or by another kind of step
                known.likeliest.copy_(chosen)
        if known.ahead is not batch:
            fill(inputs.here[1:], addresses_of(batch))
        known.ahead = None
        inputs.send()
        with ExitStack() as answering:
            answering.enter_context(self._backend.answering(inputs.here[0].shape[0]))
            known.graph.replay()
            return Launched(known.logits, known.likeliest, answering.pop_all())

    def prepare(self, batch: Batch, caches: Sequence[KVCache]) -> None:
        """See `Graphs.prepare`."""
        known = self._known(batch, caches)
        if known is not None:
            fill(known.inputs.here[1:], addresses_of(batch))
            known.ahead = batch

    def _known(self, batch: Batch, caches: Sequence[KVCache]) -> Recorded | None:
        if self._caches is not caches:
            self.clear()
            self._caches = caches
        return self._graphs.get(_kind(batch)) if self._takes(batch) else None

    def _takes(self, batch: Batch) -> bool:
        return self.usable and batch.tokens.shape[0] <= MOST_SEQUENCES and is_decode(batch)

    def clear(self) -> None:
        """See `Graphs.clear`; what they had booked is free for others, and for new ones."""
        self._caches = None
        if self._graphs:
            self._graphs.clear()
            ledger = self._backend.bench.ledger
            ledger.release("graphs", ledger.parts["graphs"])

    def _record(
        self,
        key: tuple[int, int],
        start: Start,
        rows: Tensor,
        batch: Batch,
        compute: Callable[[Tensor, DeviceStep], Tensor],
    ) -> Tensor:
        """Runs the step plainly, records it, and keeps the graph if its replay gives the same.

        Args:
            key: what kind of step it is.
            start: how the step begins.
            rows: what it gives.
            batch: the step with the widest tables of its kind.
            compute: rows, which it overwrites, to logits, or to what the head takes.
        """
        step = replace(self._backend.step(batch, self._rope), longest=key[1])
        plain = compute(to_device(rows, self._backend.device), step)
        chosen = torch.zeros(len(batch.tokens), dtype=torch.int64, device=plain.device)

        def whole(first: Tensor, step: DeviceStep) -> Tensor:
            """The step from its `first_input` on."""
            return compute(start.gather(first, chosen) if start.reads else first.clone(), step)

        inputs = [batch.tokens if start.reads else rows, *addresses_of(batch)]
        try:
            found = self._capture(inputs, step, whole, chosen)
            error = float((found.logits - plain).abs().max() / plain.abs().max())
            if not error < CLOSE:
                raise RuntimeError(f"a replayed step differs from the plain one by {error:.1e}")
        except Exception as failure:
            self.usable = False
            self.clear()
            log.warning("decoding without CUDA graphs: %.200r", failure)
            return plain
        self._graphs[key] = found
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return plain

    def _capture(
        self,
        inputs: list[Tensor],
        step: DeviceStep,
        compute: Callable[[Tensor, DeviceStep], Tensor],
        chosen: Tensor,
    ) -> Recorded:
        """Records `compute` of the first input, and the likeliest tokens in `chosen`."""
        graphs: Any = torch.cuda
        self._pool = self._pool or graphs.graph_pool_handle()
        graph, count = graphs.CUDAGraph(), len(inputs[0])
        with self._backend.recording():
            staging = Staging(self._backend.device, inputs)
            first, fixed = staging.there[0], reading(step, staging)
            with self._backend.answering(count):  # loads kernels that only such steps have
                chosen.copy_(likeliest(compute(first, fixed)))
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._backend.device)
            with graphs.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = compute(first, fixed)
                chosen.copy_(likeliest(logits))
        grown = torch.cuda.memory_reserved(self._backend.device) - before
        self._backend.bench.ledger.book("graphs", max(0, grown))
        with self._backend.answering(count):
            graph.replay()
        return Recorded(graph, staging, step, logits, chosen)


def reading(step: DeviceStep, staging: Staging) -> DeviceStep:
    """The step with its addresses in `staging`, behind the first input."""
    _, positions, contexts, *rest = staging.there
    groups = len(rest) // 2
    return replace(
        step,
        positions=positions,
        contexts=contexts,
        tables=tuple(rest[:groups]),
        slots=tuple(rest[groups:]),
    )


def _kind(batch: Batch) -> tuple[int, int]:
    """Sequences, and the end of the range of the longest context."""
    return batch.tokens.shape[0], context_range(max(batch.context_lengths.tolist()))
