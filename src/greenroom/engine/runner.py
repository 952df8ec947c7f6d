"""Turns the chunks of a step into one Batch, runs the model on it and hands each chunk its
rows. Does not know what they are used for, nor how chunks were chosen.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from greenroom.engine.collect import Collector, Found
from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.scheduler import Chunk
from greenroom.errors import BudgetError
from greenroom.layers.batch import Batch, KVCache, KVGroup

log = logging.getLogger(__name__)


def _nothing() -> None:
    """There is nothing else to do."""


class KVSpecLike(Protocol):
    """The retention rule of a KV group."""

    @property
    def window(self) -> int | None: ...


class ModelLike(Protocol):
    """What the engine needs of a model."""

    config: Any

    @property
    def kv_groups(self) -> Items[KVSpecLike]: ...

    def new_caches(
        self, blocks: Items[int], block_size: int, dtype: torch.dtype
    ) -> list[KVCache]: ...

    def forward(self, batch: Batch, caches: Items[KVCache]) -> Tensor: ...

    def hidden(self, batch: Batch, caches: Items[KVCache]) -> Tensor: ...

    def memory(self) -> dict[str, int]: ...


class Runner:
    """Runs a model on the chunks of a step.

    Args:
        model: what computes.
        caches: keys and values, one per layer.
        blocks: who holds which block.
    """

    def __init__(self, model: ModelLike, caches: Items[KVCache], blocks: BlockCache) -> None:
        self.model = model
        self.caches = caches
        self.blocks = blocks
        self._step_done = getattr(model, "step_done", lambda tokens: None)
        self._launch = getattr(model, "launch", None)
        self._collector = Collector()
        self._relieved = 0  # bytes given back

    def run(self, chunks: Items[Chunk], meanwhile: Callable[[], None] = _nothing) -> list[Found]:
        """Computes the chunks.

        Args:
            chunks: at least one.
            meanwhile: called at least once, as early as what it takes delays no computation.

        Returns:
            The rows each chunk's sequence wants, maybe none, or its next token; see `Fetch.take`.
        """
        hidden = [chunk.sequence.want == "hidden" for chunk in chunks]
        if not any(hidden):
            return self._relieving(chunks, False, meanwhile)
        results: dict[int, Found] = {}
        for kind in (False, True):
            part = [(i, chunk) for i, chunk in enumerate(chunks) if hidden[i] == kind]
            if part:
                found = self._relieving([chunk for _, chunk in part], kind, meanwhile)
                results.update(zip((index for index, _ in part), found, strict=True))
        return [results[index] for index in range(len(chunks))]

    def _relieving(
        self, chunks: Items[Chunk], hidden: bool, meanwhile: Callable[[], None]
    ) -> list[Found]:
        """`_run`, again with less of the experts in VRAM as long as memory does not suffice."""
        while (found := self._attempt(chunks, hidden, meanwhile)) is None:
            freed = getattr(self.model, "relieve", int)()
            if not freed:
                raise BudgetError(
                    "a step found no VRAM, and no expert is left there to make room; another "
                    "program may have taken it: close that, or lower --vram or --context"
                )
            if not self._relieved:
                log.warning(
                    "VRAM ran out in a step; %d MiB of experts left it. Another program may "
                    "have taken memory.", freed >> 20,
                )  # fmt: skip
            self._relieved += freed
        return found

    def _attempt(
        self, chunks: Items[Chunk], hidden: bool, meanwhile: Callable[[], None]
    ) -> list[Found] | None:
        """`_run`, or None where memory did not suffice; the error's frames are gone then, and
        with them the tensors they held."""
        try:
            return self._run(chunks, hidden, meanwhile)
        except torch.OutOfMemoryError:
            self._abandon()
            return None
        except Exception:
            self._abandon()
            raise

    def _abandon(self) -> None:
        forget = getattr(self.model, "abandon", None)
        if forget is not None:
            forget()

    @torch.inference_mode()
    def _run(
        self, chunks: Items[Chunk], hidden: bool, meanwhile: Callable[[], None]
    ) -> list[Found]:
        batch, ends = self._decoding(chunks) or self._batch(chunks)
        launched = None if hidden or self._launch is None else self._launch(batch, self.caches)
        if launched is None:
            meanwhile()
            compute = self.model.hidden if hidden else self.model.forward
            fetch = self._collector.begin(compute(batch, self.caches), None, chunks, ends)
            self._step_done(len(batch.tokens))
            return fetch.take()
        with launched.answering:
            fetch = self._collector.begin(launched.logits, launched.likeliest, chunks, ends)
            meanwhile()
            self._step_done(len(batch.tokens))
        return fetch.take()

    def _decoding(self, chunks: Items[Chunk]) -> tuple[Batch, list[int]] | None:
        """`_batch` where every sequence adds one token and wants what comes of it; else None."""
        for chunk in chunks:
            if chunk.end - chunk.start != 1 or _wanted(chunk) != chunk.start:
                return None
        count, size = len(chunks), self.blocks.block_size
        positions = [chunk.start for chunk in chunks]
        ends = list(range(1, count + 1))
        batch = Batch(
            tokens=_numbers([chunk.sequence.tokens[chunk.start] for chunk in chunks]),
            positions=_numbers(positions),
            query_starts=_numbers([0, *ends], np.int32),
            context_lengths=_numbers([position + 1 for position in positions], np.int32),
            groups=tuple(
                KVGroup(
                    self._table(group, chunks),
                    _numbers([
                        chunk.sequence.blocks[group][at // size] * size + at % size
                        for chunk, at in zip(chunks, positions, strict=True)
                    ]),
                )
                for group in range(len(self.blocks.tables))
            ),
            output_rows=_numbers(range(count)),
        )  # fmt: skip
        return batch, ends

    def _table(self, group: int, chunks: Items[Chunk]) -> Tensor:
        """A KV group's blocks of the chunks' sequences, (sequences, blocks) int32."""
        width = -(-max(chunk.end for chunk in chunks) // self.blocks.block_size)
        rows = [chunk.sequence.row for chunk in chunks]
        return torch.from_numpy(self.blocks.tables[group][rows, :width])

    def _batch(self, chunks: Items[Chunk]) -> tuple[Batch, list[int]]:
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []  # rows of all the chunks' wanted outputs
        starts, lengths, ends = [0], [], []
        for chunk in chunks:
            first = len(tokens)
            tokens += chunk.sequence.tokens[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            starts.append(len(tokens))
            lengths.append(chunk.end)
            wanted = _wanted(chunk)
            outputs += range(first + wanted - chunk.start, len(tokens))
            ends.append(len(outputs))
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lengths=torch.tensor(lengths, dtype=torch.int32),
            groups=self._groups(chunks, positions, starts),
            output_rows=torch.tensor(outputs, dtype=torch.int64),
        )
        return batch, ends

    def _groups(
        self, chunks: Items[Chunk], positions: list[int], starts: list[int]
    ) -> tuple[KVGroup, ...]:
        size = self.blocks.block_size
        rows = [chunk.sequence.row for chunk in chunks]
        groups = []
        where = np.asarray(positions)
        owner = np.repeat(rows, np.diff(starts))
        for group, table in enumerate(self.blocks.tables):
            addresses = table[owner, where // size].astype(np.int64) * size + where % size
            groups.append(KVGroup(self._table(group, chunks), torch.from_numpy(addresses)))
        return tuple(groups)


def _numbers(values: Items[int], dtype: type[np.integer[Any]] = np.int64) -> Tensor:
    return torch.from_numpy(np.array(values, dtype))


def _wanted(chunk: Chunk) -> int:
    """The first position of a chunk whose output is wanted; its end if none is."""
    sequence = chunk.sequence
    if sequence.want != "next":
        return min(max(chunk.start, sequence.delivered), chunk.end)
    return chunk.end - 1 if chunk.completes else chunk.end
