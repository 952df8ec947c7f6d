"""Turns the chunks of a step into one Batch, runs the model on it and hands each chunk its
rows. Does not know what they are used for, nor how chunks were chosen.
"""

import logging
from collections.abc import Sequence as Items
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.scheduler import Chunk
from greenroom.errors import BudgetError
from greenroom.layers.batch import Batch, KVCache, KVGroup

log = logging.getLogger(__name__)

Rows = NDArray[np.float32]  # (rows, vocabulary) logits or (rows, hidden) states


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
        self._step_done = getattr(model, "step_done", None)
        self._relieved = 0  # bytes given back

    def run(self, chunks: Items[Chunk]) -> list[Rows]:
        """Computes the chunks; returns the rows each one's sequence wants, maybe none."""
        results: dict[int, Rows] = {}
        for hidden in (False, True):
            part = [
                (index, chunk)
                for index, chunk in enumerate(chunks)
                if (chunk.sequence.want == "hidden") == hidden
            ]
            if part:
                rows = self._relieving([chunk for _, chunk in part], hidden)
                results.update(zip((index for index, _ in part), rows, strict=True))
        return [results[index] for index in range(len(chunks))]

    def _relieving(self, chunks: Items[Chunk], hidden: bool) -> list[Rows]:
        """`_run`, again with less of the experts in VRAM as long as memory does not suffice."""
        while (rows := self._attempt(chunks, hidden)) is None:
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
        return rows

    def _attempt(self, chunks: Items[Chunk], hidden: bool) -> list[Rows] | None:
        """`_run`, or None where memory did not suffice; the error's frames are gone then, and
        with them the tensors they held."""
        try:
            return self._run(chunks, hidden)
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
    def _run(self, chunks: Items[Chunk], hidden: bool) -> list[Rows]:
        batch, counts = self._batch(chunks)
        compute = self.model.hidden if hidden else self.model.forward
        rows: Rows = compute(batch, self.caches).cpu().numpy()
        if self._step_done is not None:
            self._step_done(len(batch.tokens))
        if len(counts) == 1:
            return [rows]
        return np.split(rows, np.cumsum(counts)[:-1])

    def _batch(self, chunks: Items[Chunk]) -> tuple[Batch, list[int]]:
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []  # rows of all the chunks' wanted outputs
        starts, lengths, counts = [0], [], []
        for chunk in chunks:
            first = len(tokens)
            tokens += chunk.sequence.tokens[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            starts.append(len(tokens))
            lengths.append(chunk.end)
            wanted = _wanted(chunk)
            outputs += range(first + wanted - chunk.start, len(tokens))
            counts.append(chunk.end - wanted)
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lengths=torch.tensor(lengths, dtype=torch.int32),
            groups=self._groups(chunks, positions, starts),
            output_rows=torch.tensor(outputs, dtype=torch.int64),
        )
        return batch, counts

    def _groups(
        self, chunks: Items[Chunk], positions: list[int], starts: list[int]
    ) -> tuple[KVGroup, ...]:
        size = self.blocks.block_size
        rows = [chunk.sequence.row for chunk in chunks]
        width = -(-max(chunk.end for chunk in chunks) // size)
        groups = []
        if len(positions) == len(chunks):  # decoding only: spare the array arithmetic
            for table in self.blocks.tables:
                slots = [
                    int(table[row, position // size]) * size + position % size
                    for row, position in zip(rows, positions, strict=True)
                ]
                view = torch.from_numpy(table[rows, :width])
                groups.append(KVGroup(view, torch.tensor(slots)))
            return tuple(groups)
        where = np.asarray(positions)
        owner = np.repeat(rows, np.diff(starts))
        for table in self.blocks.tables:
            addresses = table[owner, where // size].astype(np.int64) * size + where % size
            groups.append(
                KVGroup(torch.from_numpy(table[rows, :width]), torch.from_numpy(addresses))
            )
        return tuple(groups)


def _wanted(chunk: Chunk) -> int:
    """The first position of a chunk whose output is wanted; its end if none is."""
    sequence = chunk.sequence
    if sequence.want != "next":
        return min(max(chunk.start, sequence.delivered), chunk.end)
    return chunk.end - 1 if chunk.completes else chunk.end
