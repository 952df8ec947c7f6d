"""Several experts at once for many tokens: how their rows and slabs are told to kernels, and the
product of every expert's rows with its own matrix in one launch. Knows expanded weights as half
precision; not where slabs came from.

Routes are sorted by expert once a layer. A group is some of the experts, computed together; its
rows lie one expert after another, in the group's order, and a pass takes `rows` of them from
`skip` on.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two
from greenroom.kernels.sorting import by_expert

ORDER, BASE, PLACE, GROUP = range(4)  # lines of `Routes.table`
MOST = 16  # experts of a group
WIDE_SHARED = 160 << 10  # bytes of shared memory a block needs for the widest tiles


@dataclass(frozen=True, slots=True)
class Routes:
    """A layer's routes, sorted by expert.

    Attributes:
        ids: (tokens, k) int32, the expert of each route.
        weights: (tokens, k) float32.
        tokens: (tokens * k,) int32, whose row it is, in the order of experts.
        places: (tokens * k,) int32, where in that order each route is.
        starts: (experts + 1,) int32, where each expert's rows begin in it.
        table: (4, experts) int32. ORDER: the experts, group after group. By expert: BASE, its
            first row within its group; PLACE, the index of its slab; GROUP, -1 for none.
    """

    ids: Tensor
    weights: Tensor
    tokens: Tensor
    places: Tensor
    starts: Tensor
    table: Tensor

    @staticmethod
    def sort(ids: Tensor, weights: Tensor, table: Tensor) -> "Routes":
        """Of ids (tokens, k) int32 and weights (tokens, k) float32; the table comes later."""
        ids, weights = ids.contiguous(), weights.contiguous()
        tokens, places, starts = by_expert(ids, table.shape[1])
        return Routes(ids, weights, tokens, places, starts, table)

    @staticmethod
    def all_in(ids: Tensor, weights: Tensor, slots: Tensor) -> "Routes":
        """Of ids and weights as `sort` takes them, all experts one group (of number 0) in their
        own order, whose slabs `slots` (experts,) int32 tells."""
        ids, weights = ids.contiguous(), weights.contiguous()
        table = torch.empty(4, len(slots), dtype=torch.int32, device=ids.device)
        tokens, places, starts = by_expert(ids, len(slots), slots, table)
        return Routes(ids, weights, tokens, places, starts, table)


@dataclass(frozen=True, slots=True)
class Group:
    """Experts computed together.

    Attributes:
        number: as `Routes.table` has it.
        first: of its experts in the table's order.
        counts: rows of each.
    """

    number: int
    first: int
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def within(self, skip: int, rows: int) -> list[int]:
        """How many rows of each expert a pass has."""
        found, end = [], 0
        for count in self.counts:
            start, end = end, end + count
            found.append(max(0, min(end - skip, rows) - max(start - skip, 0)))
        return found

    def experts(self, routes: Routes) -> list[int]:
        """The experts; waits for the device, for twins."""
        order = routes.table[ORDER, self.first : self.first + len(self.counts)]
        found: list[int] = order.tolist()
        return found


def room_for(count: int, experts: int) -> int:
    """PAD of `members` for a group of `count` of a layer's experts: one of two, as each is
    compiled by itself, which takes seconds."""
    return MOST if count <= MOST else power_of_two(experts)


@triton.jit
def members(starts, table, experts, first, count, skip, rows, PAD: tl.constexpr):
    """Of each expert of a group, (PAD,) int32: its id, first row of the pass, rows of the pass,
    and what leads from a row of the pass to one of all sorted rows."""
    i = tl.arange(0, PAD)
    live = i < count
    expert = tl.load(table + first + i, mask=live, other=0)
    begin = tl.load(starts + expert)
    size = tl.load(starts + expert + 1) - begin
    base = tl.load(table + experts + expert) - skip
    low = tl.maximum(base, 0)
    high = tl.minimum(base + size, rows)
    number = tl.where(live, tl.maximum(high - low, 0), 0)
    return expert, low, number, begin - base


@triton.jit
def pick(values, chosen):
    """The one chosen of a few integers."""
    return tl.sum(tl.where(chosen, values, 0), 0)


@kernel(do_not_specialize=["first", "count", "skip", "rows"])
def _product(
    a, b, out, tokens, starts, table, experts, first, count, skip, rows, n, cols,
    GATHER: tl.constexpr, EVEN: tl.constexpr, PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    _, low, number, shift = members(starts, table, experts, first, count, skip, rows, PAD)
    # Tiles of one expert follow each other, rows fastest: its weights are read while in cache.
    ends = tl.cumsum((number + BM - 1) // BM * tl.cdiv(n, BN), 0)
    which = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
    chosen = tl.arange(0, PAD) == which
    low, number = pick(low, chosen), pick(number, chosen)
    high = tl.cdiv(number, BM)
    tile = tl.program_id(0) - pick(ends, chosen) + high * tl.cdiv(n, BN)
    row = low + tile % high * BM + tl.arange(0, BM)
    live = row < low + number
    column = tile // high * BN + tl.arange(0, BN)
    inside = column < n
    source = tl.where(live, row, low)
    if GATHER:
        source = tl.load(tokens + source + pick(shift, chosen))
    k = tl.arange(0, BK)
    matrix = b + which.to(tl.int64) * n * cols
    a_at = a + source.to(tl.int64)[:, None] * cols + k[None, :]
    b_at = matrix + tl.where(inside, column, 0)[None, :] * cols + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, cols, BK):
        if EVEN:
            x = tl.load(a_at)
            w = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=(k < cols - start)[None, :], other=0.0)
            w = tl.load(b_at, mask=(k < cols - start)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
        a_at += BK
        b_at += BK
    at = out + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, acc, mask=live[:, None] & inside[None, :])


@cache
def wide(device: torch.device) -> bool:
    """Whether blocks may take enough shared memory for the widest tiles."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) >= WIDE_SHARED


def tile(rows: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps and stages, for `rows` of an expert."""
    if rows <= 96:
        return 64, 128, 64, 4, 3
    return (128, 256, 64, 8, 3) if wide(device) else (128, 128, 64, 8, 3)


def product(
    a: Tensor, b: Tensor, routes: Routes, group: Group, skip: int, rows: int, gather: bool
) -> Tensor:
    """Multiplies every expert's rows by the transpose of its matrix.

    Args:
        a: float16, (tokens, cols) if rows are gathered, else (rows, cols) of the pass.
        b: (experts of the group, n, cols) float16.
        routes, group: whose rows.
        skip, rows: of the group that this pass takes.
        gather: whether `a` has tokens.

    Returns:
        (rows, n) float32.
    """
    n, cols = b.shape[1:]
    out = torch.empty(rows, n, device=a.device)
    counts = group.within(skip, rows)
    bm, bn, bk, warps, stages = tile(rows // len(counts), a.device)
    tiles = sum(-(-count // bm) for count in counts) * -(-n // bn)
    _product[(tiles,)](
        a, b, out, routes.tokens, routes.starts, routes.table, routes.table.shape[1],
        group.first, len(counts), skip, rows, n, cols, GATHER=gather, EVEN=cols % bk == 0,
        PAD=MOST, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def product_twin(
    a: Tensor, b: Tensor, routes: Routes, group: Group, skip: int, rows: int, gather: bool
) -> Tensor:
    """`product` in plain torch; the truth it is held against."""
    owner, where = rows_of(routes, group, skip, rows)
    x = a[routes.tokens[where].long()] if gather else a
    return torch.einsum("rk,rnk->rn", x.float(), b.float()[owner])


def rows_of(routes: Routes, group: Group, skip: int, rows: int) -> tuple[Tensor, Tensor]:
    """Of each row of a pass: which of the group's experts it is for, and its index among all
    sorted rows; (rows,) int64 both. For twins."""
    starts = routes.starts.tolist()
    owner = [i for i, count in enumerate(group.counts) for _ in range(count)]
    where = [row for e in group.experts(routes) for row in range(starts[e], starts[e + 1])]
    device = routes.ids.device
    both = torch.tensor([owner, where], dtype=torch.int64, device=device)[:, skip : skip + rows]
    return both[0], both[1]
