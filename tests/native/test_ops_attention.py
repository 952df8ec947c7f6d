"""Paged attention against plain torch on every tier: mixed batches, windows, sinks, dropped
blocks, both cache types; and that nothing but its own context changes a token's result."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from greenroom import native


@pytest.fixture(params=native.usable_tiers())
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return native.module(request.param)


@dataclass(frozen=True)
class Case:
    """Shapes of one call; `sequences` has (queries, context) pairs."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    key_width: int = 32
    value_width: int = 32
    block_size: int = 16
    window: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Call:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    sinks: Tensor | None
    case: Case

    def run(self, lib: ModuleType, threads: int = 2, scale: float = 0.2) -> Tensor:
        out = torch.full((*self.q.shape[:2], self.v_cache.shape[3]), torch.nan)
        lib.attention(
            lib.Pool(threads),
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_starts,
            self.context_lengths,
            scale,
            self.case.window,
            self.sinks,
            out,
        )
        return out


def make(case: Case, seed: int = 0, sharpness: float = 1.0) -> Call:
    """Random tensors; blocks in random places, those behind the window dropped, all else NaN."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-context // case.block_size) for _, context in case.sequences]
    blocks = sum(counts) + 3
    places = iter(torch.randperm(blocks, generator=g).tolist())
    tables = torch.full((len(counts), max(counts, default=0) + 1), -1, dtype=torch.int32)
    shape = (blocks, case.kv_heads, case.block_size)
    k_cache = torch.full((*shape, case.key_width), torch.nan)
    v_cache = torch.full((*shape, case.value_width), torch.nan)
    for s, (queries, context) in enumerate(case.sequences):
        oldest = max(0, context - queries - case.window + 1) if case.window else 0
        for i in range(counts[s]):
            if (i + 1) * case.block_size <= oldest or queries == 0:
                continue
            block = next(places)
            used = min(case.block_size, context - i * case.block_size)
            k_cache[block, :, :used] = torch.randn(case.kv_heads, used, case.key_width, generator=g)
            v_cache[block, :, :used] = torch.randn(
                case.kv_heads, used, case.value_width, generator=g
            )
            tables[s, i] = block
    starts = torch.tensor([0, *(q for q, _ in case.sequences)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), case.heads, case.key_width, generator=g) * sharpness
    return Call(
        q,
        k_cache.to(case.dtype),
        v_cache.to(case.dtype),
        tables,
        starts,
        torch.tensor([c for _, c in case.sequences], dtype=torch.int32),
        torch.randn(case.heads, generator=g) if case.sinks else None,
        case,
    )


def expected(call: Call, scale: float = 0.2) -> Tensor:
    """The definition, in float64, one sequence at a time."""
    case = call.case
    rows = []
    for s, (queries, context) in enumerate(case.sequences):
        oldest = max(0, context - queries - case.window + 1) if case.window else 0
        keys = torch.arange(oldest, context)
        places, offsets = call.block_tables[s, keys // case.block_size], keys % case.block_size
        k = call.k_cache[places, :, offsets].double()  # (keys, kv_heads, key_width)
        v = call.v_cache[places, :, offsets].double()
        group = case.heads // case.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        start = int(call.query_starts[s])
        q = call.q[start : start + queries].double()
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        position = torch.arange(context - queries, context)[:, None]
        hidden = keys > position
        if case.window:
            hidden |= position - keys >= case.window
        scores.masked_fill_(hidden, -torch.inf)
        if call.sinks is not None:
            sink = call.sinks.double()[:, None, None].expand(-1, queries, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(rows).float()


CASES = {
    "one token": Case(((1, 1),)),
    "decode": Case(((1, 77), (1, 5), (1, 200))),
    "prefill": Case(((130, 130),)),
    "mixed": Case(((1, 100), (37, 37), (1, 1), (64, 190), (3, 64))),
    "idle sequence": Case(((2, 9), (0, 40), (1, 3))),
    "multi-head": Case(((9, 70), (1, 33)), heads=5, kv_heads=5),
    "one kv head": Case(((9, 70), (1, 33)), heads=7, kv_heads=1),
    "many heads a group": Case(((3, 70), (1, 33)), heads=40, kv_heads=1),
    "groups of three": Case(((20, 90), (1, 33)), heads=6, kv_heads=2),
    "odd widths": Case(((20, 90), (1, 33)), key_width=21, value_width=13),
    "width 80": Case(((20, 90), (1, 33)), key_width=80, value_width=80),
    "different widths": Case(((20, 90), (1, 33)), key_width=48, value_width=32),
    "width 1": Case(((5, 9),), key_width=1, value_width=1),
    "small blocks": Case(((20, 90), (1, 33)), block_size=3),
    "blocks of one": Case(((20, 90),), block_size=1),
    "big blocks": Case(((20, 200), (1, 33)), block_size=256),
    "window": Case(((20, 90), (1, 33), (1, 500), (100, 300)), window=17),
    "window of one": Case(((20, 90), (1, 33)), window=1),
    "window beyond context": Case(((20, 90), (1, 33)), window=4096),
    "sinks": Case(((20, 90), (1, 33), (1, 1)), sinks=True),
    "gpt-oss": Case(((1, 900), (40, 150)), 16, 2, 64, 64, block_size=32, window=128, sinks=True),
    "long": Case(((1, 2100), (5, 1300), (2, 513), (1, 512)), block_size=32),
    "long window": Case(((1, 2100), (5, 1300)), block_size=32, window=700),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(lib: ModuleType, name: str, dtype: torch.dtype) -> None:
    call = make(replace(CASES[name], dtype=dtype))
    torch.testing.assert_close(call.run(lib), expected(call), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", ["mixed", "gpt-oss", "long", "long window", "odd widths"])
def test_threads_do_not_change_a_bit(lib: ModuleType, name: str) -> None:
    call = make(replace(CASES[name], dtype=torch.float16))
    alone = call.run(lib, threads=1)
    for threads in (2, 3, 9):
        assert torch.equal(call.run(lib, threads), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(((60, 60),), 8, 2, 64, 64),
        Case(((60, 1500),), 6, 2, 64, 64, sinks=True),
        Case(((60, 700),), 5, 5, 40, 24, window=90),
        Case(((9, 1300),), 64, 2, 64, 64, window=600),
    ],
)
def test_chunks_and_batches_do_not_change_a_bit(
    lib: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    call = make(replace(case, dtype=dtype))
    queries, context = case.sequences[0]
    whole = call.run(lib)
    at = 0
    while at < queries:  # chunks of 1, 2, 3, ... queries, beside another token of the sequence
        size = min(at % 7 + 1, queries - at)
        end = context - queries + at + size
        part = replace(
            call,
            q=torch.cat([call.q[at : at + size], call.q[:1]]),
            block_tables=call.block_tables.repeat(2, 1),
            query_starts=torch.tensor([0, size, size + 1], dtype=torch.int32),
            context_lengths=torch.tensor([end, context - queries + 1], dtype=torch.int32),
        )
        out = part.run(lib)
        assert torch.equal(out[:size], whole[at : at + size])
        assert torch.equal(out[size:], whole[:1])
        at += size


def test_query_may_be_a_slice(lib: ModuleType) -> None:
    call = make(CASES["mixed"])
    fused = torch.randn(call.q.shape[0], 50 + call.q[0].numel())
    fused[:, 50:] = call.q.flatten(1)
    view = fused[:, 50:].view(call.q.shape)
    assert not view.is_contiguous()
    assert torch.equal(replace(call, q=view).run(lib), call.run(lib))


@pytest.mark.parametrize("sharpness", [0.0, 1e3, 1e18])
def test_extreme_scores_stay_finite(lib: ModuleType, sharpness: float) -> None:
    call = make(replace(CASES["long"], sinks=True), sharpness=sharpness)
    out = call.run(lib)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, expected(call), rtol=1e-3, atol=1e-3)


def test_nan_in_a_visible_key_is_not_hidden(lib: ModuleType) -> None:
    call = make(Case(((4, 40),)))
    block, offset = int(call.block_tables[0, 1]), 5  # position 21: all four queries see it
    call.k_cache[block, 0, offset, 3] = torch.nan
    out = call.run(lib)
    assert out[:, :2].isnan().all()
    assert torch.isfinite(out[:, 2:]).all()


def refused(lib: ModuleType, match: str, call: Call, **changes: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        replace(call, **changes).run(lib)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("block", [-1, -2, 10**6, 2**31 - 1])
def test_blocks_outside_the_cache_are_refused(lib: ModuleType, block: int) -> None:
    call = make(Case(((20, 90), (1, 33))))
    tables = call.block_tables.clone()
    tables[1, 2] = block
    refused(lib, r"block_tables: entry \(1, 2\)", call, block_tables=tables)
    tables[1, 2] = call.block_tables[1, 2]
    tables[1, 3] = block  # beyond the context: nobody looks there
    assert torch.equal(replace(call, block_tables=tables).run(lib), call.run(lib))


def test_dropped_block_inside_the_window_is_refused(lib: ModuleType) -> None:
    call = make(Case(((1, 90),), window=33))  # sees positions 57 to 89: blocks 3, 4, 5
    assert call.block_tables[0].tolist()[:3] == [-1, -1, -1]
    tables = call.block_tables.clone()
    tables[0, 3] = -1
    refused(lib, r"entry \(0, 3\) is -1", call, block_tables=tables)


def test_wrong_arguments_are_refused(lib: ModuleType) -> None:
    call = make(Case(((20, 90), (1, 33))))
    refused(lib, "query_starts", call, query_starts=i32(0, 20, 22))
    refused(lib, "query_starts", call, query_starts=i32(1, 20, 21))
    refused(lib, "query_starts.*decrease", call, query_starts=i32(0, 30, 21))
    refused(lib, "query_starts", call, query_starts=i32(0, 21))
    refused(lib, "context_lengths", call, context_lengths=i32(19, 33))
    refused(lib, "context_lengths", call, context_lengths=i32(-1, 33))
    refused(lib, "context_lengths", call, context_lengths=i32(90, 10**6))
    refused(lib, "context_lengths", call, context_lengths=i32(90, 2**31 - 1))
    refused(lib, "context_lengths", call, context_lengths=torch.tensor([90, 33]))
    refused(lib, "block_tables", call, block_tables=call.block_tables.long())
    refused(lib, "block_tables", call, block_tables=call.block_tables[:1])
    refused(lib, "q: ", call, q=call.q[..., :31])
    refused(lib, "q: ", call, q=call.q[:, :3])
    refused(lib, "q: ", call, q=call.q.double())
    refused(lib, "v_cache", call, v_cache=call.v_cache[:-1])
    refused(lib, "v_cache", call, v_cache=call.v_cache.half())
    refused(lib, "k_cache", call, k_cache=call.k_cache.bfloat16())
    refused(lib, "k_cache", call, k_cache=call.k_cache.transpose(0, 1))
    refused(lib, "sinks", call, sinks=torch.zeros(3))
    refused(lib, "window", call, case=replace(call.case, window=0))
    refused(lib, "window", call, case=replace(call.case, window=-5))


def test_no_sequences(lib: ModuleType) -> None:
    assert make(Case(())).run(lib).shape == (0, 4, 32)
