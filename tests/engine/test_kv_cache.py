"""The block cache: nothing leaks, nothing is freed twice, reuse finds what it should."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from greenroom.engine.kv_cache import BlockCache, BlockPool, GroupSize
from greenroom.engine.sequence import Sequence

SIZE, WINDOW, CHUNK, CONTEXT = 4, 7, 8, 48


def new_cache(full: int = 20, windowed: int = 14, store: Any = None) -> BlockCache:
    groups = [GroupSize(None, full), GroupSize(WINDOW, windowed)]
    return BlockCache(groups, block_size=SIZE, rows=3, context_length=CONTEXT, store=store)


class Shelf:
    """A store for two blocks a group that notes what was written where."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, bytes], bytes] = {}
        self.written: dict[tuple[int, int], bytes] = {}

    def __contains__(self, key: tuple[int, bytes]) -> bool:
        return key in self.kept

    def keep(self, key: tuple[int, bytes], block: int) -> None:
        self.kept.pop(key, None)
        self.kept[key] = key[1]
        while len(self.kept) > 6:
            del self.kept[next(iter(self.kept))]

    def take(self, key: tuple[int, bytes]) -> bytes:
        return self.kept[key]

    def restore(self, key: tuple[int, bytes], block: int, content: bytes) -> None:
        assert content == key[1]
        self.written[key[0], block] = content


def compute(cache: BlockCache, sequence: Sequence) -> None:
    while sequence.remaining:
        end = min(len(sequence), sequence.computed + CHUNK)
        assert cache.extend(sequence, end)
        cache.commit(sequence, end)


class Machine(RuleBasedStateMachine):
    """Admits, computes, grows and releases sequences in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.admitted: list[Sequence] = []

    @rule(length=st.integers(1, 30), family=st.integers(0, 2), fork=st.integers(0, 30))
    def admit(self, length: int, family: int, fork: int) -> None:
        tokens = [family * 100 + i if i < fork else 999 - i for i in range(length)]
        sequence = Sequence(tokens, 2)
        before = [pool.available for pool in self.cache.pools]
        if self.cache.admit(sequence, CHUNK):
            self.admitted.append(sequence)
            assert sequence.computed % SIZE == 0
            assert sequence.remaining >= 1
        else:
            assert before == [pool.available for pool in self.cache.pools]
            assert sequence.blocks == [[], []]

    @precondition(lambda self: self.admitted)
    @rule(which=st.integers(0, 2), tokens=st.integers(1, CHUNK))
    def advance(self, which: int, tokens: int) -> None:
        sequence = self.admitted[which % len(self.admitted)]
        if not sequence.remaining and len(sequence) < CONTEXT:
            sequence.tokens.append(5)
        end = min(len(sequence), sequence.computed + tokens)
        if self.cache.extend(sequence, end):
            self.cache.commit(sequence, end)

    @precondition(lambda self: self.admitted)
    @rule(which=st.integers(0, 2))
    def release(self, which: int) -> None:
        self.cache.release(self.admitted.pop(which % len(self.admitted)))

    @invariant()
    def references_are_counted(self) -> None:
        for group, pool in enumerate(self.cache.pools):
            held = [block for s in self.admitted for block in s.blocks[group] if block >= 0]
            assert pool.references == [held.count(block) for block in range(pool.size)]
            free = sorted([*pool.blank, *pool.idle])
            assert free == [block for block in range(pool.size) if block not in held]

    @invariant()
    def known_blocks_are_known_both_ways(self) -> None:
        for pool in self.cache.pools:
            pairs = {d: b for b, d in enumerate(pool.digest_of) if d is not None}
            assert pairs == pool.known
            assert all(pool.digest_of[block] is None for block in pool.blank)

    @invariant()
    def tables_mirror_the_blocks(self) -> None:
        for group, table in enumerate(self.cache.tables):
            for sequence in self.admitted:
                blocks = sequence.blocks[group]
                row = table[sequence.row].tolist()
                assert row == blocks + [-1] * (len(row) - len(blocks))

    @invariant()
    def windows_are_held(self) -> None:
        for sequence in self.admitted:
            first = max(0, sequence.computed - WINDOW + 1) // SIZE
            held = sequence.blocks[1][first:]
            assert all(block >= 0 for block in held)
            assert all(block < 0 for block in sequence.blocks[1][:first])


class MachineWithStore(Machine):
    """The same with a store, which must bring back what the block then stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf()
        self.cache = new_cache(12, 10, self.shelf)

    @invariant()
    def restored_blocks_stand_for_their_content(self) -> None:
        for (group, block), content in self.shelf.written.items():
            assert self.cache.pools[group].digest_of[block] == content
        self.shelf.written.clear()


MachineWithStore.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestBlockCacheWithStore = MachineWithStore.TestCase
Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockCache = Machine.TestCase


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(block)


def test_a_common_beginning_is_shared_in_whole_blocks() -> None:
    cache = new_cache()
    first = Sequence(range(18), 2)
    assert cache.admit(first, CHUNK)
    compute(cache, first)
    second = Sequence([*range(14), 70, 71, 72], 2)
    assert cache.admit(second, CHUNK)
    assert second.computed == 12
    assert second.blocks[0][:3] == first.blocks[0][:3]
    assert second.blocks[1] == [-1, *second.blocks[1][1:]]  # (12 - 7 + 1) // 4 blocks are past


def test_at_least_one_token_is_left_to_compute() -> None:
    cache = new_cache()
    first = Sequence(range(16), 2)
    assert cache.admit(first, CHUNK)
    compute(cache, first)
    again = Sequence(range(16), 2)
    assert cache.admit(again, CHUNK)
    assert again.computed == 12


def test_content_after_a_difference_is_not_shared() -> None:
    cache = new_cache()
    first = Sequence(range(16), 2)
    assert cache.admit(first, CHUNK)
    compute(cache, first)
    other = Sequence([9, *range(1, 16)], 2)  # equal blocks after the first, but not their past
    assert cache.admit(other, CHUNK)
    assert other.computed == 0


def test_reuse_stops_where_a_window_group_lost_its_blocks() -> None:
    cache = new_cache(full=60, windowed=9)
    first = Sequence(range(40), 2)
    assert cache.admit(first, CHUNK)
    compute(cache, first)
    cache.release(first)
    lost = cache.pools[1].digest_of[:]
    assert sum(digest is not None for digest in lost) <= 9
    again = Sequence(range(40), 2)
    assert cache.admit(again, CHUNK)
    needed = range(max(0, again.computed - WINDOW + 1) // SIZE, again.computed // SIZE)
    assert all(again.blocks[1][index] >= 0 for index in needed)


def test_the_least_recently_used_block_goes_first_and_ends_before_beginnings() -> None:
    cache = BlockCache([GroupSize(None, 6)], block_size=SIZE, rows=2, context_length=24)
    for start in (0, 100):
        sequence = Sequence(range(start, start + 12), 1)
        assert cache.admit(sequence, CHUNK)
        compute(cache, sequence)
        cache.release(sequence)
    newcomer = Sequence(range(200, 204), 1)
    assert cache.admit(newcomer, CHUNK)
    cache.release(newcomer)
    old, young = Sequence(range(12), 1), Sequence(range(100, 112), 1)
    assert cache.admit(old, CHUNK)
    assert old.computed == 8  # its last block made room
    cache.release(old)
    assert cache.admit(young, CHUNK)
    assert young.computed == 8  # all but the token that must be computed, in whole blocks


def test_random_tokens_never_share() -> None:
    cache = new_cache(full=200, windowed=200)
    source = random.Random(3)
    for _ in range(30):
        sequence = Sequence([source.randrange(10**9) for _ in range(20)], 2)
        assert cache.admit(sequence, CHUNK)
        assert sequence.computed == 0
        compute(cache, sequence)
        cache.release(sequence)
