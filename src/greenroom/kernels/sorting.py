"""Routes sorted by expert, in two launches: each block of routes is counted, then every route is
told its place. Routes of one expert keep their order. Knows nothing of what experts compute.
"""

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two

BLOCK = 128  # routes of a program
STEP = 8  # blocks whose counts are read at a time


@kernel
def _count(ids, counts, routes, experts, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Column e of a line of counts: routes of expert e; the last one: routes of nobody."""
    route = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + route, mask=route < routes, other=PAD)
    index = tl.arange(0, PAD)
    whose = tl.where(index == experts, -1, index)
    number = tl.sum((expert[:, None] == whose[None, :]).to(tl.int32), 0)
    line = counts + tl.program_id(0) * (experts + 1)
    tl.store(line + index, number, mask=index <= experts)


@kernel
def _order(
    ids, counts, tokens, places, starts, slots, table, routes, experts, blocks, K: tl.constexpr,
    TABLE: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    index = tl.arange(0, PAD)
    total = tl.zeros((PAD,), tl.int32)
    before = total  # in the blocks before this one
    for start in range(0, blocks, STEP):
        block = start + tl.arange(0, STEP)
        inside = (block < blocks)[:, None] & (index <= experts)[None, :]
        number = tl.load(counts + block[:, None] * (experts + 1) + index[None, :], mask=inside,
                         other=0)  # fmt: skip
        total += tl.sum(number, 0)
        before += tl.sum(tl.where((block < here)[:, None], number, 0), 0)
    nobody = tl.sum(tl.where(index == experts, total, 0), 0)  # their routes come first
    begin = tl.where(index == experts, 0, tl.cumsum(total, 0) - total + nobody)
    if here == 0:
        tl.store(starts + index, tl.where(index == experts, routes, begin), mask=index <= experts)
        if TABLE:
            live = index < experts
            tl.store(table + index, index, mask=live)
            tl.store(table + experts + index, begin, mask=live)
            slot = tl.load(slots + index, mask=live)
            tl.store(table + 2 * experts + index, slot, mask=live)
            tl.store(table + 3 * experts + index, index * 0, mask=live)
    route = here * BLOCK + tl.arange(0, BLOCK)
    live = route < routes
    expert = tl.load(ids + route, mask=live, other=PAD)
    whose = tl.where(index == experts, -1, index)
    first = tl.where(expert[:, None] == whose[None, :], (begin + before)[None, :], 0)
    other = tl.load(ids + here * BLOCK + tl.arange(0, BLOCK), mask=live, other=PAD)
    earlier = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    rank = tl.sum(((expert[:, None] == other[None, :]) & earlier).to(tl.int32), 1)
    place = tl.sum(first, 1) + rank
    tl.store(places + route, place, mask=live)
    tl.store(tokens + place, route // K, mask=live)


def by_expert(
    ids: Tensor, experts: int, slots: Tensor | None = None, table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts routes.

    Args:
        ids: (tokens, k) int32, contiguous; -1 for no expert.
        experts: of the layer.
        slots: (experts,) int32, for the table.
        table: (4, experts) int32 to be filled for one group of all experts in their own order,
            see `grouped.Routes`; or None.

    Returns:
        int32: (tokens * k,) whose row each is, in the order of experts; (tokens * k,) where in
        that order each route is; (experts + 1,) where each expert's begin.
    """
    routes, k = ids.numel(), ids.shape[1]
    blocks, pad = -(-routes // BLOCK), power_of_two(experts + 1)
    memory = torch.empty(
        2 * routes + (blocks + 1) * (experts + 1), dtype=torch.int32, device=ids.device
    )
    tokens, places, starts, counts = memory.split(
        [routes, routes, experts + 1, blocks * (experts + 1)]
    )
    _count[(blocks,)](ids, counts, routes, experts, BLOCK=BLOCK, PAD=pad)
    _order[(blocks,)](
        ids, counts, tokens, places, starts, ids if slots is None else slots,
        ids if table is None else table, routes, experts, blocks, K=k, TABLE=table is not None,
        BLOCK=BLOCK, PAD=pad, STEP=STEP,
    )  # fmt: skip
    return tokens, places, starts


def by_expert_twin(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`by_expert` in plain torch; the truth it is held against."""
    sorted_ids, order = torch.sort(ids.view(-1), stable=True)
    edges = torch.arange(experts + 1, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(sorted_ids, edges, out_int32=True)
    line = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    places = torch.empty_like(line).scatter_(0, order, line)
    return (order // ids.shape[1]).int(), places, starts
