"""Decides what the next step computes: one token of every sequence that is decoding, then
pieces of prompts within a budget, so that no decode ever waits longer than one chunk.

When blocks run out, the sequence admitted last gives its blocks back and is computed again
later. Knows tokens and blocks, neither the model nor what comes out of it.
"""

from collections import deque
from dataclasses import dataclass

from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, end) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the sequence's last token, so that one can be sampled."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Continuous batching over a block cache.

    Args:
        cache: where admitted sequences get their blocks.
        prefill_chunk: most prompt tokens in one step, all sequences together.
    """

    def __init__(self, cache: BlockCache, prefill_chunk: int) -> None:
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that fits the context always gets its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that is finished, failed or cancelled."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self.cache.release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self, under_way: list[Chunk] | None = None) -> list[Chunk]:
        """The chunks of one step; empty only if there is nothing to do.

        Args:
            under_way: of a step that was begun already; it is the next one as long as any of its
                sequences goes on. Others may have ended meanwhile.
        """
        if under_way is not None and any(chunk.sequence.row >= 0 for chunk in under_way):
            self._admit()
            return under_way
        while True:
            self._admit()
            chunks = self._decodes() + self._prefills()
            if chunks or not (self.running or self.waiting):
                return chunks
            if self.running:  # each waits for blocks another one holds
                self._preempt(self.running[-1])

    def steady(self, chunks: list[Chunk]) -> bool:
        """Whether the step behind this one is of the same sequences if none of them ends."""
        alive = all(chunk.sequence.row >= 0 for chunk in chunks)
        return alive and len(chunks) == len(self.running)

    def commit(self, chunk: Chunk) -> None:
        """Takes note that a chunk was computed."""
        self.cache.commit(chunk.sequence, chunk.end)

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for sequence in tuple(self.running):
            if sequence.row < 0 or sequence.remaining != 1:
                continue
            start = sequence.computed
            while not self.cache.extend(sequence, start + 1):
                # Never one that has its chunk already: those were admitted earlier.
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                chunks.append(Chunk(sequence, start, start + 1))
        return chunks

    def _admit(self) -> None:
        while self.waiting:
            sequence = self.waiting[0]
            # One block per running sequence stays free for the tokens they are about to add.
            if not self.cache.admit(sequence, self.prefill_chunk, spare=len(self.running)):
                return
            self.running.append(self.waiting.popleft())
            if not sequence.reused:
                sequence.reused = min(sequence.computed, sequence.prompt_length)

    def _prefills(self) -> list[Chunk]:
        """Half of the budget goes to the sequence that has waited longest, the rest to the
        shortest first: a long prompt neither starves nor holds up short ones. Sequences with a
        limit of their own share it, the oldest first.
        """
        pending = [sequence for sequence in self.running if sequence.remaining > 1]
        if not pending:
            return []
        oldest, budget = pending[0], self.prefill_chunk
        rest = sorted(pending[1:], key=lambda sequence: sequence.remaining)
        reserved = min(oldest.remaining, budget if not rest else max(1, budget // 2))
        share = {oldest: _limited(oldest, reserved, 0)}
        left, used = budget - reserved, share[oldest] if oldest.chunk_limit else 0
        for sequence in rest:
            share[sequence] = _limited(sequence, left, used)
            left -= share[sequence]
            used += share[sequence] if sequence.chunk_limit else 0
        share[oldest] = _limited(oldest, reserved + left, used - share[oldest])
        chunks = []
        for sequence in pending:
            end = sequence.computed + share[sequence]
            if share[sequence] and self.cache.extend(sequence, end):
                chunks.append(Chunk(sequence, sequence.computed, end))
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self.cache.release(sequence)
        self.waiting.appendleft(sequence)


def _limited(sequence: Sequence, tokens: int, used: int) -> int:
    """Tokens of a sequence's next chunk; others have `used` so many of its limit."""
    limit = sequence.chunk_limit
    return min(sequence.remaining, tokens, tokens if limit is None else max(0, limit - used))
