"""Experts in RAM that the device computes itself in a short step, because the bus has room while
the CPU computes the others: which ones they are, decided on the device beside the routes, and how
their slabs come. Knows neither why so many nor who computes the rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two

BLOCK = 1024  # words copied at a time
PARTS = 32  # programs that copy a slab: few keep the bus busy
ROUTES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Guests:
    """What one layer's guests of one step need.

    Attributes:
        quota: (experts,) int32 on the device: how many of m experts without a slot come as
            guests, at m - 1. At most m, and no more than `memory` holds.
        places: (experts,) int32 on the device, written in every step: where an expert's slab lies
            in `memory`, or -1 if it is no guest. In steps of one token only those of the experts
            that it uses and that have no slot are written.
        memory: (slabs, slab bytes) uint8 that the device reads: `source` itself, or room for
            copies.
        source: (experts, slab bytes) uint8 in pinned memory.
        tokens: of the step; guests of one token are used where they lie.
    """

    quota: Tensor
    places: Tensor
    memory: Tensor
    source: Tensor
    tokens: int

    @property
    def fetched(self) -> bool:
        """Whether slabs are copied before they are used: worth it where several tokens read one."""
        return self.memory is not self.source


@triton.jit
def absent(ids, table, at, routes, TABLE: tl.constexpr):
    """Experts of routes that have no slot, -1 for the others."""
    expert = tl.load(ids + at, mask=at < routes, other=-1)
    if TABLE:
        slot = tl.load(table + expert, mask=expert >= 0, other=-1)
        expert = tl.where(slot >= 0, -1, expert)
    return expert


@triton.jit
def invite(
    expert, ids, table, quota, places, routes, experts, TABLE: tl.constexpr, FETCHED: tl.constexpr,
    NAMES: tl.constexpr, STEP: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Chooses a layer's guests, those with most routes first, and writes their places; returns
    `expert`, as `absent` gave it, with -1 for guests."""
    if SINGLE:
        rest = _invite_single(expert, quota, places)
    else:
        rest = _invite_many(
            expert, ids, table, quota, places, routes, experts, TABLE, FETCHED, NAMES, STEP
        )
    return rest


@triton.jit
def _invite_single(expert, quota, places):
    """Of one token, whose guests are never copied: the first ones."""
    missing = (expert >= 0).to(tl.int32)
    wanted = tl.load(quota + tl.maximum(tl.sum(missing, 0) - 1, 0))
    guest = (missing > 0) & (tl.cumsum(missing, 0) <= wanted)
    tl.store(places + expert, tl.where(guest, expert, -1), mask=missing > 0)
    return tl.where(guest, -1, expert)


@triton.jit
def _invite_many(
    expert, ids, table, quota, places, routes, experts, TABLE: tl.constexpr, FETCHED: tl.constexpr,
    NAMES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    name = tl.arange(0, NAMES)
    uses = tl.zeros((NAMES,), tl.int32)
    for first in range(0, routes, STEP):
        some = absent(ids, table, first + tl.arange(0, STEP), routes, TABLE)
        uses += tl.sum((some[None, :] == name[:, None]).to(tl.int32), 1)
    missing = tl.sum((uses > 0).to(tl.int32), 0)
    wanted = tl.load(quota + tl.maximum(missing - 1, 0))
    wanted = tl.minimum(wanted, missing)
    least = tl.max(uses, 0) + 1
    found = least * 0
    while found < wanted:
        least -= 1
        found = tl.sum((uses >= least).to(tl.int32), 0)
    level = (uses == least).to(tl.int32)  # of these only the first come
    kept = tl.sum(level, 0) - (found - wanted)
    guest = (uses > least) | ((level > 0) & (tl.cumsum(level, 0) <= kept))
    place = tl.cumsum(guest.to(tl.int32), 0) - 1 if FETCHED else name
    tl.store(places + name, tl.where(guest, place, -1), mask=name < experts)
    tl.debug_barrier()
    there = tl.load(places + expert, mask=expert >= 0, other=-1)
    return tl.where(there >= 0, -1, expert)


@kernel
def _pick(
    ids, table, quota, places, out, routes, experts, TABLE: tl.constexpr, FETCHED: tl.constexpr,
    ROUTES: tl.constexpr, NAMES: tl.constexpr, STEP: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, ROUTES)
    expert = absent(ids, table, at, routes, TABLE)
    rest = invite(
        expert, ids, table, quota, places, routes, experts, TABLE, FETCHED, NAMES, STEP, SINGLE
    )
    tl.store(out + at, rest, mask=at < routes)


def choose_guests(ids: Tensor, table: Tensor | None, guests: Guests) -> Tensor:
    """Chooses the guests of a layer where nothing else is launched that could.

    Args:
        ids: (tokens, k) int32, contiguous; -1 for no route.
        table: (experts,) int32, the slot of each expert or -1, or None.
        guests: of the layer; their places are written.

    Returns:
        (tokens, k) int32, ids with -1 for experts that have a slot or are guests.
    """
    out, experts = torch.empty_like(ids), len(guests.places)
    _pick[(1,)](
        ids, ids if table is None else table, guests.quota, guests.places, out, ids.numel(),
        experts, TABLE=table is not None, FETCHED=guests.fetched,
        ROUTES=power_of_two(ids.numel()), NAMES=power_of_two(experts),
        STEP=ROUTES_AT_ONCE, SINGLE=guests.tokens == 1,
    )  # fmt: skip
    return out


def choose_guests_twin(ids: Tensor, table: Tensor | None, guests: Guests) -> Tensor:
    """`choose_guests` in plain torch; the truth it is held against."""
    missing = ids if table is None else torch.where(table[ids.clamp(min=0).long()] >= 0, -1, ids)
    here = missing[missing >= 0].long()
    uses = torch.bincount(here, minlength=len(guests.places))
    count = int((uses > 0).sum())
    wanted = min(int(guests.quota[count - 1]), count) if count else 0
    chosen = torch.argsort(uses, descending=True, stable=True)[:wanted].sort().values
    if len(ids) == 1:
        chosen = here[:wanted]
        guests.places[here] = -1
    else:
        guests.places.fill_(-1)
    where = torch.arange(wanted) if guests.fetched else chosen
    guests.places[chosen] = where.int().to(guests.places.device)
    there = guests.places[missing.clamp(min=0).long()] >= 0
    return torch.where(there, -1, missing)


@kernel
def _fetch(source, memory, places, words, part, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    place = tl.load(places + expert)
    if place < 0:
        return
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, words)
    slab = source + expert.to(tl.int64) * words
    to = memory + place.to(tl.int64) * words
    for at in range(start, end, BLOCK):
        word = at + tl.arange(0, BLOCK)
        tl.store(to + word, tl.load(slab + word, mask=word < end), mask=word < end)


def fetch(guests: Guests) -> None:
    """Copies the guests' slabs to their places, if they are copied at all."""
    if not guests.fetched:
        return
    experts, nbytes = guests.source.shape
    words = nbytes // 4
    part = -(-words // (PARTS * BLOCK)) * BLOCK
    _fetch[(experts, -(-words // part))](
        guests.source.view(torch.int32), guests.memory.view(torch.int32), guests.places, words,
        part, BLOCK=BLOCK,
    )  # fmt: skip
