"""Turns the chunks of a step into one Batch: tokens, positions and the addresses of their keys and
values. Can lay out a decode step before its tokens are known. Does not know the model.
"""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.scheduler import Chunk
from greenroom.errors import GreenroomError
from greenroom.layers.batch import Batch, KVGroup


class Layout:
    """Lays out steps.

    Args:
        blocks: who holds which block.
    """

    def __init__(self, blocks: BlockCache) -> None:
        self._blocks = blocks
        self._most = blocks.tables[0].shape[1] * blocks.block_size  # positions a table has
        # Chunks, how often blocks had been taken back by then, and their batch.
        self._ahead: tuple[list[Chunk], int, Batch] | None = None

    def __call__(self, chunks: list[Chunk]) -> tuple[Batch, list[int]]:
        """The batch, and the end of each chunk's output rows.

        Raises:
            GreenroomError: a sequence has no blocks any more.
        """
        if any(chunk.sequence.row < 0 for chunk in chunks):  # or the last row would be taken
            raise GreenroomError("a request ended before its step could be computed again")
        return self._decoding(chunks) or self._batch(chunks)

    def ahead(self, chunks: Items[Chunk]) -> Batch | None:
        """Lays out the step behind this one for the case that no sequence ends, joins or leaves;
        then `__call__` returns this very batch with its tokens filled in. None if it cannot.
        """
        self._ahead = None
        if any(chunk.sequence.want != "next" or chunk.sequence.row < 0 for chunk in chunks):
            return None
        following = [Chunk(chunk.sequence, chunk.end, chunk.end + 1) for chunk in chunks]
        for chunk in following:
            if chunk.end > self._most or not self._blocks.extend(chunk.sequence, chunk.end):
                return None
        batch = self._one_each(following)
        self._ahead = following, self._blocks.releases, batch
        return batch

    def _decoding(self, chunks: list[Chunk]) -> tuple[Batch, list[int]] | None:
        """`_batch` where every sequence adds one token and wants what comes of it; else None."""
        for chunk in chunks:
            if chunk.end - chunk.start != 1 or _wanted(chunk) != chunk.start:
                return None
        if self._ahead is not None and self._ahead[:2] == (chunks, self._blocks.releases):
            batch = self._ahead[2]
        else:
            batch = self._one_each(chunks)
        batch.tokens.numpy()[:] = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
        return batch, list(range(1, len(chunks) + 1))

    def _one_each(self, chunks: Items[Chunk]) -> Batch:
        """A batch of one token of each sequence; which, is not filled in yet."""
        count, size = len(chunks), self._blocks.block_size
        positions = [chunk.start for chunk in chunks]
        return Batch(
            tokens=torch.empty(count, dtype=torch.int64),
            positions=_numbers(positions),
            query_starts=_numbers(range(count + 1), np.int32),
            context_lengths=_numbers([chunk.end for chunk in chunks], np.int32),
            groups=tuple(
                KVGroup(
                    self._table(group, chunks),
                    _numbers([
                        chunk.sequence.blocks[group][at // size] * size + at % size
                        for chunk, at in zip(chunks, positions, strict=True)
                    ]),
                )
                for group in range(len(self._blocks.tables))
            ),
            output_rows=_numbers(range(count)),
        )  # fmt: skip

    def _table(self, group: int, chunks: Items[Chunk]) -> Tensor:
        """A KV group's blocks of the chunks' sequences, (sequences, blocks) int32."""
        width = -(-max(chunk.end for chunk in chunks) // self._blocks.block_size)
        rows = [chunk.sequence.row for chunk in chunks]
        return torch.from_numpy(self._blocks.tables[group][rows, :width])

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
        size = self._blocks.block_size
        rows = [chunk.sequence.row for chunk in chunks]
        groups = []
        where = np.asarray(positions)
        owner = np.repeat(rows, np.diff(starts))
        for group, table in enumerate(self._blocks.tables):
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
