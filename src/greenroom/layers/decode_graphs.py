"""Decode steps as CUDA graphs: recorded once per number of sequences and range of contexts, then
replayed with new inputs in the same memory, without a launch per kernel.

Only steps in which the host never waits can be recorded; experts on the CPU are met through
memory both processors see. A new graph must give the logits of the plain step it was recorded
from; otherwise graphs are given up. Knows no family.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from greenroom.layers.backend import Compute, Embed
from greenroom.layers.batch import Batch, KVCache, KVGroup
from greenroom.layers.cuda_backend import CudaBackend, DeviceStep
from greenroom.layers.rope import Rope

MOST_SEQUENCES = 16  # longer steps expand weights, where launches no longer matter
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
    tokens = len(batch.tokens)
    return tokens == len(batch.context_lengths) == len(batch.output_rows)


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
        inputs: tensors of the step, see `inputs_of`.
        logits: (n, vocabulary) float32.
    """

    graph: Any
    inputs: list[Tensor]
    logits: Tensor


def inputs_of(x: Tensor, step: DeviceStep) -> list[Tensor]:
    """What differs from step to step: embeddings and addresses."""
    return [x, step.positions, step.contexts, *step.tables, *step.slots]


class DecodeGraphs:
    """The recorded steps of one model.

    Args:
        backend: computes all layers.
        rope: the model's.
    """

    def __init__(self, backend: CudaBackend, rope: Rope | None) -> None:
        self._backend, self._rope = backend, rope
        self._graphs: OrderedDict[tuple[int, int], Recorded] = OrderedDict()
        self._uses: dict[tuple[int, int], int] = {}
        self._caches: list[int] = []  # addresses the graphs hold
        self._pool: Any = None
        self.usable = backend.device.type == "cuda"

    def __call__(
        self, batch: Batch, caches: Sequence[KVCache], embed: Embed, compute: Compute
    ) -> Tensor | None:
        """See `Graphs.__call__`; the memory of the result is used again by the next call."""
        tokens = len(batch.tokens)
        if not self.usable or tokens > MOST_SEQUENCES or not is_decode(batch):
            return None
        addresses = [part.data_ptr() for cache in caches for part in (cache.k, cache.v)]
        if self._caches != addresses:
            self._graphs.clear()
            self._caches = addresses
        key = tokens, context_range(int(batch.context_lengths.max()))
        known = self._graphs.get(key)
        if known is None:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] < USES:
                return None
        x, step = embed(batch.tokens), self._step(batch, key[1], caches[0].k.shape[2])
        if known is None:
            return self._record(key, x, step, partial(compute, caches=caches))
        for here, there in zip(known.inputs, inputs_of(x, step), strict=True):
            here.copy_(there)
        with self._backend.answering(tokens):
            known.graph.replay()
        return known.logits

    def clear(self) -> None:
        """See `Graphs.clear`."""
        self._graphs.clear()

    def _step(self, batch: Batch, longest: int, block: int) -> DeviceStep:
        step = self._backend.step(widened(batch, -(-longest // block)), self._rope)
        return replace(step, longest=longest)

    def _record(
        self, key: tuple[int, int], x: Tensor, step: DeviceStep, compute: Callable[..., Tensor]
    ) -> Tensor:
        """Runs the step plainly, records it, and keeps the graph if its replay gives the same."""
        first = x.clone()  # the residual stream is added to in place
        plain = compute(x, step)
        try:
            found = self._capture(first, step, compute)
            replayed = found.logits
            error = float((replayed - plain).abs().max() / plain.abs().max())
            if not error < CLOSE:
                raise RuntimeError(f"a replayed step differs from the plain one by {error:.1e}")
        except Exception as failure:
            self.usable = False
            self._graphs.clear()
            log.warning("decoding without CUDA graphs: %.200r", failure)
            return plain
        self._graphs[key] = found
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        return plain

    def _capture(self, x: Tensor, step: DeviceStep, compute: Callable[..., Tensor]) -> Recorded:
        graphs: Any = torch.cuda
        self._pool = self._pool or graphs.graph_pool_handle()
        graph = graphs.CUDAGraph()
        with self._backend.recording():
            with self._backend.answering(len(x)):  # loads kernels that only such steps have
                compute(x.clone(), step)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._backend.device)
            with graphs.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = compute(x.clone(), step)
        grown = torch.cuda.memory_reserved(self._backend.device) - before
        self._backend.bench.ledger.book("graphs", max(0, grown))
        with self._backend.answering(len(x)):
            graph.replay()
        return Recorded(graph, inputs_of(x, step), logits)
