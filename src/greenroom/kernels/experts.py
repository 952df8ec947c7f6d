"""Experts that sit in VRAM slots, or come as guests over the bus, for steps of a few tokens: every
route whose expert is found is computed from its slab; the others are left alone. Shapes do not
depend on the routes and nothing waits for the host, so the launches can be captured in a graph.
Knows slabs, not policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.guests import Guests
from greenroom.kernels.launch import INTERPRETED, kernel
from greenroom.kernels.lines import Walk, line_products
from greenroom.kernels.matvec import iq4_table
from greenroom.kernels.planes import (
    PERMUTED,
    PLANES,
    group_dots,
    in_order,
    order,
    room,
    split,
    store_planes,
)

WARPS = 4
LINES = 32  # read at a time by a program, or groups of sixteen columns
TABLE_LINES = 32  # of codes looked up in a table, which needs registers of its own
REDUCE = 256  # columns per program of the last sum
ACTIVATIONS = {"silu": 0, "gpt-oss": 1}


class Layout(Protocol):
    """Where the parts of a slab lie; `experts.slabs.SlabLayout` is one."""

    @property
    def d(self) -> int: ...
    @property
    def f(self) -> int: ...
    @property
    def types(self) -> Any: ...
    @property
    def matrices(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def biases(self) -> tuple[tuple[int, int], ...] | None: ...
    @property
    def nbytes(self) -> int: ...


@triton.jit
def activate(gate, up, KIND: tl.constexpr):
    """silu(gate) * up, or gpt-oss's clamped form."""
    if KIND == 1:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        out = gate / (1.0 + tl.exp(-1.702 * gate)) * up
    else:
        out = gate / (1.0 + tl.exp(-gate)) * up
    return out


@triton.jit
def _rows(
    first, second, iq4, x, words, units, stride, cols, payload_bytes, lines, C: tl.constexpr,
    ORDER: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr, LINES: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Two groups of 16 rows of one format times one token, (16,) float32 each: from planes where
    there are some, else from x. Without TWO the second is left out."""
    acc = tl.zeros((LINES, 16), tl.float32)
    acc2 = acc
    if ORDER > 0:
        for start in range(0, cols // 16, LINES):
            one, two = group_dots(
                first, second, words, units, start + tl.arange(0, LINES), cols // 16, stride,
                payload_bytes, C, PLANES, ASM, TWO,
            )  # fmt: skip
            acc += one
            if TWO:
                acc2 += two
    else:
        for start in range(0, lines, LINES):
            line = start + tl.arange(0, LINES)
            acc += line_products(
                first, iq4, x, line, lines, cols, payload_bytes,
                C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7],
            )  # fmt: skip
            if TWO:
                acc2 += line_products(
                    second, iq4, x, line, lines, cols, payload_bytes,
                    C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7],
                )  # fmt: skip
    return tl.sum(acc, 0), tl.sum(acc2, 0)


@triton.jit
def _slab(memory, table, guests, places, expert, slab_bytes, GUESTS: tl.constexpr):
    """(address of an expert's slab, whether there is one that the device reads)."""
    slot = tl.load(table + tl.maximum(expert, 0))
    if GUESTS:  # noqa: SIM102 (known when compiled, unlike the other)
        if slot < 0:
            slot = tl.load(places + tl.maximum(expert, 0))
            memory = guests
    return memory + tl.maximum(slot, 0).to(tl.int64) * slab_bytes, (expert >= 0) & (slot >= 0)


@kernel
def _gate_up(
    memory, table, guests, places, ids, seen, x, words, units, inner, inner_words, inner_units,
    iq4, slab_bytes, d, f, up_at, gate_bias, up_bias, g_group, g_payload, g_lines, u_group,
    u_payload, u_lines, K: tl.constexpr, G: tl.constexpr, U: tl.constexpr, ORDER: tl.constexpr,
    THEN: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, SEEN: tl.constexpr, SAME: tl.constexpr, GUESTS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0)
    expert = tl.load(ids + route)
    if SEEN:
        tl.store(seen + route, expert, mask=tl.program_id(1) == 0)
    slab, there = _slab(memory, table, guests, places, expert, slab_bytes, GUESTS)
    if not there:
        return
    token = (route // K).to(tl.int64)
    x += token * d
    words += token * PLANES * (d // 4)
    units += token * (d // 8)
    rows = tl.program_id(1)
    gate_rows = slab + rows.to(tl.int64) * g_group
    up_rows = slab + up_at + rows.to(tl.int64) * u_group
    gate, up = _rows(
        gate_rows, up_rows, iq4, x, words, units, d // 4, d, g_payload, g_lines, G, ORDER, PLANES,
        ASM, LINES, SAME,
    )  # fmt: skip
    if not SAME:
        up, _ = _rows(
            up_rows, up_rows, iq4, x, words, units, d // 4, d, u_payload, u_lines, U, ORDER,
            PLANES, ASM, LINES, False,
        )  # fmt: skip
    row = rows * 16 + tl.arange(0, 16)
    if BIAS:
        biases = slab.to(tl.pointer_type(tl.float32))
        gate += tl.load(biases + gate_bias // 4 + row, mask=row < f, other=0.0)
        up += tl.load(biases + up_bias // 4 + row, mask=row < f, other=0.0)
    out = activate(gate, up, ACTIVATION)
    tl.store(inner + route * f + row, out, mask=row < f)
    if THEN > 0:
        store_planes(
            in_order(out, THEN), inner_words + route * PLANES * (f // 4),
            inner_units + route * (f // 8), rows * 4, f // 4, f // 4, PLANES,
        )  # fmt: skip


@kernel
def _down(
    memory, table, guests, places, ids, inner, words, units, out, iq4, slab_bytes, d, f, down_at,
    bias_at, group_bytes, payload_bytes, lines, C: tl.constexpr, ORDER: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr, GUESTS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + route)
    slab, there = _slab(memory, table, guests, places, expert, slab_bytes, GUESTS)
    if not there:
        return
    rows = tl.program_id(1)
    group = slab + down_at + rows.to(tl.int64) * group_bytes
    y, _ = _rows(
        group, group, iq4, inner + route * f, words + route * PLANES * (f // 4),
        units + route * (f // 8), f // 4, f, payload_bytes, lines, C, ORDER, PLANES, ASM, LINES,
        False,
    )  # fmt: skip
    row = rows * 16 + tl.arange(0, 16)
    if BIAS:
        biases = slab.to(tl.pointer_type(tl.float32))
        y += tl.load(biases + bias_at // 4 + row, mask=row < d, other=0.0)
    tl.store(out + route * d + row, y, mask=row < d)


@kernel
def _reduce(
    table, places, ids, weights, parts, out, d, K: tl.constexpr, GUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(K):  # in the order of the routes: the same sum every time
        route = token * K + i
        expert = tl.load(ids + route)
        _, there = _slab(parts, table, parts, places, expert, 0, GUESTS)
        if there:
            part = tl.load(parts + route.to(tl.int64) * d + column, mask=column < d, other=0.0)
            acc += part * tl.load(weights + route)
    tl.store(out + token.to(tl.int64) * d + column, acc, mask=column < d)


@dataclass(frozen=True, slots=True)
class Slabs:
    """Where `hits` finds experts; see there."""

    memory: Tensor
    table: Tensor
    guests: Guests | None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the kernels take them."""
        if self.guests is None:
            return self.memory, self.table, self.memory, self.table
        return self.memory, self.table, self.guests.memory, self.guests.places


def hits(
    memory: Tensor,
    table: Tensor,
    layout: Layout,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str = "silu",
    seen: Tensor | None = None,
    cut: Callable[[Tensor, int], tuple[Tensor, Tensor]] = split,
    guests: Guests | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts that have a slot or are guests.

    Args:
        memory: (slots, layout.nbytes) uint8.
        table: (experts,) int32, the slot of each expert or -1.
        layout: of a slab.
        hidden: (tokens, d) float32, contiguous.
        ids: (tokens, k) int32, contiguous; -1 for no route.
        weights: (tokens, k) float32, contiguous.
        activation: "silu" or "gpt-oss".
        seen: (at least tokens * k,) int32 that takes the ids, hits or not, or None.
        cut: `split`, or what knows the planes of `hidden` already.
        guests: of this layer in this step; where they lie is known by now.

    Returns:
        (tokens, d) float32; zeros where nothing hit.
    """
    tokens, k = ids.shape
    d, f = layout.d, layout.f
    walk = Walk.of(int(layout.types[2]), f)
    then = order(walk.constants)
    gate, up = (Walk.of(int(kind), d) for kind in layout.types[:2])
    first = order(gate.constants) if order(gate.constants) == order(up.constants) else 0
    planes = cut(hidden, first) if first else (ids, hidden)
    slabs = Slabs(memory, table, guests)
    inner = _activations(slabs, layout, hidden, planes, ids, activation, seen, first, then)
    parts = torch.empty(tokens * k, d, device=hidden.device)
    out = torch.empty(tokens, d, device=hidden.device)
    _down[(tokens * k, -(-d // 16))](
        *slabs.arguments, ids, *inner, parts, iq4_table(hidden.device), layout.nbytes, d, f,
        layout.matrices[2][0], layout.biases[2][0] if layout.biases else 0, walk.group_bytes,
        walk.payload_bytes, walk.lines, C=walk.constants, ORDER=then, PLANES=PLANES,
        ASM=not INTERPRETED, BIAS=layout.biases is not None, GUESTS=guests is not None,
        LINES=_lines(then), num_warps=WARPS,
    )  # fmt: skip
    _reduce[(tokens, -(-d // REDUCE))](
        table, slabs.arguments[3], ids, weights, parts, out, d, K=k, GUESTS=guests is not None,
        BLOCK=REDUCE,
    )  # fmt: skip
    return out


def _lines(order: int) -> int:
    return TABLE_LINES if order == PERMUTED else LINES


def _activations(
    slabs: Slabs,
    layout: Layout,
    hidden: Tensor,
    cut: tuple[Tensor, Tensor],
    ids: Tensor,
    activation: str,
    seen: Tensor | None,
    first: int,
    then: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and activation of `hits`: (routes, f) float32, and its planes and units in the
    order `then`, unless that is 0. cut: hidden's in the order `first`, likewise."""
    (tokens, k), d, f, device = ids.shape, layout.d, layout.f, hidden.device
    gate, up = (Walk.of(int(kind), d) for kind in layout.types[:2])
    inner = torch.empty(tokens * k, f, device=device)
    planes = room(tokens * k, f, device) if then else (ids, inner)
    gate_bias, up_bias = (layout.biases[0][0], layout.biases[1][0]) if layout.biases else (0, 0)
    _gate_up[(tokens * k, -(-f // 16))](
        *slabs.arguments, ids, ids if seen is None else seen, hidden, *cut, inner, *planes,
        iq4_table(device), layout.nbytes, d, f, layout.matrices[1][0], gate_bias, up_bias,
        gate.group_bytes, gate.payload_bytes, gate.lines, up.group_bytes, up.payload_bytes,
        up.lines, K=k, G=gate.constants, U=up.constants, ORDER=first, THEN=then, PLANES=PLANES,
        ASM=not INTERPRETED, BIAS=layout.biases is not None, ACTIVATION=ACTIVATIONS[activation],
        SEEN=seen is not None, SAME=gate.constants == up.constants,
        GUESTS=slabs.guests is not None, LINES=_lines(first), num_warps=WARPS,
    )  # fmt: skip
    return inner, *planes
