"""Decides which block of the KV cache holds which positions of which sequence.

One pool of blocks per KV group. Full blocks are remembered by a digest of all tokens up to
their end, so that a later request with the same beginning shares them; the least recently
used of those nobody holds are given away first. With a store, their content is kept there and
comes back when it is wanted. Knows nothing of tensors: the runner and the store write.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from greenroom.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class GroupSize:
    """A KV group's retention rule and the number of blocks it may use."""

    window: int | None  # a query sees its own and the window - 1 positions before; None: all
    blocks: int


class Store(Protocol):
    """Where the content of blocks is kept that lose their place; see PrefixStore."""

    def __contains__(self, key: tuple[int, bytes]) -> bool: ...

    def keep(self, key: tuple[int, bytes], block: int) -> None: ...

    def take(self, key: tuple[int, bytes]) -> Any: ...

    def restore(self, key: tuple[int, bytes], block: int, content: Any) -> None: ...


class BlockPool:
    """Blocks of one group: held (counted references), idle (content known, nobody holds
    it) or blank.

    Args:
        blocks: how many.
        leaving: told the digest and the number of a block whose known content is given up.
    """

    def __init__(self, blocks: int, leaving: Callable[[bytes, int], None] | None = None) -> None:
        self.leaving = leaving
        self.references = [0] * blocks
        self.digest_of: list[bytes | None] = [None] * blocks
        self.known: dict[bytes, int] = {}  # digest -> block
        self.idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.blank = list(range(blocks - 1, -1, -1))

    @property
    def size(self) -> int:
        return len(self.references)

    @property
    def available(self) -> int:
        """Blocks that could be allocated now."""
        return len(self.blank) + len(self.idle)

    def allocate(self) -> int:
        """A block for new content; the caller made sure that one is available."""
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            digest = self.digest_of[block]
            assert digest is not None
            if self.leaving is not None:
                self.leaving(digest, block)
            del self.known[digest]
            self.digest_of[block] = None
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block with known content."""
        if self.references[block] == 0:
            del self.idle[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; with the last one the block becomes idle or blank."""
        if self.references[block] <= 0:
            raise RuntimeError(f"KV block {block} was released more often than it was held")
        self.references[block] -= 1
        if self.references[block] == 0:
            if self.digest_of[block] is None:
                self.blank.append(block)
            else:
                self.idle[block] = None

    def remember(self, block: int, digest: bytes) -> None:
        """The block's content is final; a twin that is already known stays the known one."""
        if digest not in self.known and self.digest_of[block] is None:
            self.known[digest] = block
            self.digest_of[block] = digest


class BlockCache:
    """Gives sequences their blocks and takes them back.

    Args:
        groups: retention rule and number of blocks of each KV group.
        block_size: positions per block.
        rows: sequences that may be admitted at the same time.
        context_length: most positions of one sequence.
        reuse: whether to remember blocks for later requests.
        store: keeps the content of remembered blocks that are given to somebody else.
    """

    def __init__(
        self,
        groups: Items[GroupSize],
        *,
        block_size: int,
        rows: int,
        context_length: int,
        reuse: bool = True,
        store: Store | None = None,
    ) -> None:
        self.windows = [group.window for group in groups]
        self.store = store
        self.pools = [
            BlockPool(group.blocks, None if store is None else partial(self._keep, index))
            for index, group in enumerate(groups)
        ]
        self.block_size = block_size
        self.reuse = reuse
        width = -(-context_length // block_size)
        # (rows, blocks) int32 per group: what attention looks addresses up in
        self.tables: list[NDArray[np.int32]] = [
            np.full((rows, width), -1, np.int32) for _ in groups
        ]
        self.free_rows = list(range(rows - 1, -1, -1))
        self.releases = 0  # how often blocks of a sequence were taken back

    def admit(self, sequence: Sequence, chunk: int, spare: int = 0) -> bool:
        """Gives a waiting sequence a row, shared blocks for the beginning it has in common
        with earlier ones, and room for the rest of its tokens.

        Full-attention blocks are taken at once for all tokens there are; a window group
        only needs room for its window and one chunk. `spare` blocks must stay available.
        Returns False, with nothing changed, if there is not enough room.
        """
        if not self.free_rows:
            return False
        prefix = self._match(sequence)
        stored = self._share(sequence, prefix)
        total = -(-len(sequence) // self.block_size)
        for window, pool, away in zip(self.windows, self.pools, stored, strict=True):
            need = total - prefix
            if window is not None:
                need = min(need, -(-(window + chunk) // self.block_size) + 1)
            if need + len(away) + spare > pool.available:
                self._drop_blocks(sequence)
                return False
        self._restore(sequence, stored)
        sequence.row = self.free_rows.pop()
        sequence.computed = prefix * self.block_size
        for group, blocks in enumerate(sequence.blocks):
            self.tables[group][sequence.row, : len(blocks)] = blocks
            if self.windows[group] is None:
                self._extend(sequence, group, total)
        return True

    def extend(self, sequence: Sequence, end: int) -> bool:
        """Makes room for positions below `end`; False, with nothing changed, if there is none."""
        count = -(-end // self.block_size)
        for group, pool in enumerate(self.pools):
            if count - len(sequence.blocks[group]) > pool.available:
                return False
        for group in range(len(self.pools)):
            self._extend(sequence, group, count)
        return True

    def commit(self, sequence: Sequence, end: int) -> None:
        """Positions below `end` are computed: remember full blocks, let go what no later
        token can see.
        """
        size = self.block_size
        first, last = sequence.computed // size, end // size
        sequence.computed = end
        if self.reuse:
            for index in range(first, last):
                digest = sequence.digest(index, size)
                for pool, blocks in zip(self.pools, sequence.blocks, strict=True):
                    if blocks[index] >= 0:
                        pool.remember(blocks[index], digest)
        for group, window in enumerate(self.windows):
            if window is not None:
                self._leave_window(sequence, group, max(0, end - window + 1) // size)

    def release(self, sequence: Sequence) -> None:
        """Takes everything back from an admitted sequence; its known blocks stay reusable."""
        self.releases += 1
        for table in self.tables:
            table[sequence.row] = -1
        self.free_rows.append(sequence.row)
        sequence.row = -1
        sequence.computed = 0
        self._drop_blocks(sequence)

    def report(self) -> list[dict[str, int | None]]:
        """Of each group: its window, and blocks in all, held, and known but held by nobody."""
        return [
            {
                "window": window,
                "blocks": pool.size,
                "held": pool.size - pool.available,
                "reusable": len(pool.idle),
            }
            for window, pool in zip(self.windows, self.pools, strict=True)
        ]

    def _match(self, sequence: Sequence) -> int:
        """Blocks of the longest beginning that every group still has what it needs of."""
        if not (self.reuse and sequence.reuse):
            return 0
        size, best = self.block_size, 0
        runs = [0] * len(self.pools)  # known blocks in a row, up to the current one
        for index in range((len(sequence) - 1) // size):  # one token is left to compute
            digest = sequence.digest(index, size)
            end = (index + 1) * size
            complete = True
            for group, pool in enumerate(self.pools):
                here = digest in pool.known or self._stored(group, digest)
                runs[group] = runs[group] + 1 if here else 0
                window = self.windows[group]
                first = 0 if window is None else max(0, end - window + 1) // size
                complete &= runs[group] > index - first
                if window is None and not runs[group]:
                    return best
            if complete:
                best = index + 1
        return best

    def _stored(self, group: int, digest: bytes) -> bool:
        return self.store is not None and (group, digest) in self.store

    def _keep(self, group: int, digest: bytes, block: int) -> None:
        assert self.store is not None
        self.store.keep((group, digest), block)

    def _share(self, sequence: Sequence, prefix: int) -> list[dict[int, Any]]:
        """Holds what is known of a prefix; for each group, the content of the blocks that only
        the store has. It is taken out now: room made for one block may push out another.
        """
        stored: list[dict[int, Any]] = []
        end = prefix * self.block_size
        for group, pool in enumerate(self.pools):
            window = self.windows[group]
            first = 0 if window is None else max(0, end - window + 1) // self.block_size
            blocks = [pool.known.get(digest, -1) for digest in sequence.digests[first:prefix]]
            away: dict[int, Any] = {}
            for index, block in enumerate(blocks, first):
                if block >= 0:
                    pool.share(block)
                else:
                    assert self.store is not None
                    away[index] = self.store.take((group, sequence.digests[index]))
            stored.append(away)
            sequence.blocks[group] = [-1] * first + blocks
            sequence.kept_from[group] = first
        return stored

    def _restore(self, sequence: Sequence, stored: Items[dict[int, Any]]) -> None:
        """Copies contents from the store into blocks of their own."""
        for group, (pool, away) in enumerate(zip(self.pools, stored, strict=True)):
            for index, content in away.items():
                assert self.store is not None
                digest, block = sequence.digests[index], pool.allocate()
                self.store.restore((group, digest), block, content)
                pool.remember(block, digest)
                sequence.blocks[group][index] = block

    def _extend(self, sequence: Sequence, group: int, count: int) -> None:
        blocks = sequence.blocks[group]
        pool, table = self.pools[group], self.tables[group]
        while len(blocks) < count:
            block = pool.allocate()
            table[sequence.row, len(blocks)] = block
            blocks.append(block)

    def _leave_window(self, sequence: Sequence, group: int, first: int) -> None:
        blocks = sequence.blocks[group]
        for index in range(sequence.kept_from[group], min(first, len(blocks))):
            self.pools[group].release(blocks[index])
            blocks[index] = -1
            self.tables[group][sequence.row, index] = -1
            sequence.kept_from[group] = index + 1

    def _drop_blocks(self, sequence: Sequence) -> None:
        # The end first: when room gets scarce, the beginning, which more requests share,
        # is then given away last.
        for group, pool in enumerate(self.pools):
            for block in reversed(sequence.blocks[group]):
                if block >= 0:
                    pool.release(block)
            sequence.blocks[group] = []
            sequence.kept_from[group] = 0
