"""Experts that sit in VRAM slots, for steps of a few tokens: every route whose expert the table
finds is computed from its slab; the others are left alone. Shapes do not depend on the routes and
nothing waits for the host, so the launches can be captured in a graph. Knows slabs, not policy.
"""

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.lines import Walk, line_products
from greenroom.kernels.matvec import iq4_table
from greenroom.kernels.planes import (
    INTERPRETED,
    PLANES,
    in_order,
    line_dots,
    order,
    room,
    split,
    store_planes,
)

LINES, WARPS = 64, 4  # lines a program reads at a time
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
def _row_products(
    group, iq4, x, words, units, stride, cols, payload_bytes, lines, C: tl.constexpr,
    ORDER: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """One group of 16 rows times one token, (16,) float32: planes where there are some, else x."""
    acc = tl.zeros((LINES, 16), tl.float32)
    for start in range(0, lines, LINES):
        line = start + tl.arange(0, LINES)
        if ORDER > 0:
            acc += line_dots(
                group, words, units, line, lines, stride, payload_bytes, C, PLANES, ASM
            )
        else:
            acc += line_products(
                group, iq4, x, line, lines, cols, payload_bytes,
                C[0], C[1], C[2], C[3], C[4], C[5], C[6], C[7],
            )  # fmt: skip
    return tl.sum(acc, 0)


@triton.jit
def _gate_up(
    memory, table, ids, seen, x, words, units, inner, inner_words, inner_units, iq4, slab_bytes,
    d, f, up_at, gate_bias, up_bias, g_group, g_payload, g_lines, u_group, u_payload, u_lines,
    K: tl.constexpr, G: tl.constexpr, U: tl.constexpr, ORDER: tl.constexpr, THEN: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SEEN: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0)
    expert = tl.load(ids + route)
    if SEEN:
        tl.store(seen + route, expert, mask=tl.program_id(1) == 0)
    slot = tl.load(table + tl.maximum(expert, 0))
    if (expert < 0) | (slot < 0):
        return
    slab = memory + slot.to(tl.int64) * slab_bytes
    token = (route // K).to(tl.int64)
    x += token * d
    words += token * PLANES * (d // 4)
    units += token * (d // 16)
    rows = tl.program_id(1)
    gate = _row_products(
        slab + rows.to(tl.int64) * g_group, iq4, x, words, units, d // 4, d, g_payload, g_lines,
        G, ORDER, PLANES, ASM, LINES,
    )  # fmt: skip
    up = _row_products(
        slab + up_at + rows.to(tl.int64) * u_group, iq4, x, words, units, d // 4, d, u_payload,
        u_lines, U, ORDER, PLANES, ASM, LINES,
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
            inner_units + route * (f // 16), rows * 4, f // 4, f // 4, PLANES,
        )  # fmt: skip


@triton.jit
def _down(
    memory, table, ids, inner, words, units, out, iq4, slab_bytes, d, f, down_at, bias_at,
    group_bytes, payload_bytes, lines, C: tl.constexpr, ORDER: tl.constexpr, PLANES: tl.constexpr,
    ASM: tl.constexpr, BIAS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + route)
    slot = tl.load(table + tl.maximum(expert, 0))
    if (expert < 0) | (slot < 0):
        return
    slab = memory + slot.to(tl.int64) * slab_bytes
    rows = tl.program_id(1)
    y = _row_products(
        slab + down_at + rows.to(tl.int64) * group_bytes, iq4, inner + route * f,
        words + route * PLANES * (f // 4), units + route * (f // 16), f // 4, f, payload_bytes,
        lines, C, ORDER, PLANES, ASM, LINES,
    )  # fmt: skip
    row = rows * 16 + tl.arange(0, 16)
    if BIAS:
        biases = slab.to(tl.pointer_type(tl.float32))
        y += tl.load(biases + bias_at // 4 + row, mask=row < d, other=0.0)
    tl.store(out + route * d + row, y, mask=row < d)


@triton.jit
def _reduce(table, ids, weights, parts, out, d, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(K):  # in the order of the routes: the same sum every time
        route = token * K + i
        expert = tl.load(ids + route)
        slot = tl.load(table + tl.maximum(expert, 0))
        if (expert >= 0) & (slot >= 0):
            part = tl.load(parts + route.to(tl.int64) * d + column, mask=column < d, other=0.0)
            acc += part * tl.load(weights + route)
    tl.store(out + token.to(tl.int64) * d + column, acc, mask=column < d)


def hits(
    memory: Tensor,
    table: Tensor,
    layout: Layout,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str = "silu",
    seen: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts that have a slot.

    Args:
        memory: (slots, layout.nbytes) uint8.
        table: (experts,) int32, the slot of each expert or -1.
        layout: of a slab.
        hidden: (tokens, d) float32, contiguous.
        ids: (tokens, k) int32, contiguous; -1 for no route.
        weights: (tokens, k) float32, contiguous.
        activation: "silu" or "gpt-oss".
        seen: (at least tokens * k,) int32 that takes the ids, hits or not, or None.

    Returns:
        (tokens, d) float32; zeros where nothing hit.
    """
    tokens, k = ids.shape
    routes, d, f = tokens * k, layout.d, layout.f
    walks = [Walk.of(int(kind), cols) for kind, cols in zip(layout.types, (d, d, f), strict=True)]
    gate, up, down = walks
    biases = layout.biases
    (gate_bias, _), (up_bias, _), (down_bias, _) = biases or ((0, 0),) * 3
    first, then = order(gate.constants), order(down.constants)
    if order(up.constants) != first:  # never seen: gate and up in orders that differ
        first = 0
    words, units = split(hidden, first) if first else (ids, hidden)
    inner = torch.empty(routes, f, device=hidden.device)
    inner_words, inner_units = room(routes, f, hidden.device) if then else (ids, inner)
    parts = torch.empty(routes, d, device=hidden.device)
    out = torch.empty(tokens, d, device=hidden.device)
    iq4 = iq4_table(hidden.device)
    same: dict[str, Any] = {
        "PLANES": PLANES, "ASM": not INTERPRETED, "BIAS": biases is not None,
        "LINES": LINES, "num_warps": WARPS,
    }  # fmt: skip
    _gate_up[(routes, -(-f // 16))](
        memory, table, ids, ids if seen is None else seen, hidden, words, units, inner,
        inner_words, inner_units, iq4, layout.nbytes, d, f, layout.matrices[1][0], gate_bias,
        up_bias, gate.group_bytes, gate.payload_bytes, gate.lines, up.group_bytes,
        up.payload_bytes, up.lines, K=k, G=gate.constants, U=up.constants, ORDER=first, THEN=then,
        ACTIVATION=ACTIVATIONS[activation], SEEN=seen is not None, **same,
    )  # fmt: skip
    _down[(routes, -(-d // 16))](
        memory, table, ids, inner, inner_words, inner_units, parts, iq4, layout.nbytes, d, f,
        layout.matrices[2][0], down_bias, down.group_bytes, down.payload_bytes, down.lines,
        C=down.constants, ORDER=then, **same,
    )  # fmt: skip
    _reduce[(tokens, -(-d // REDUCE))](table, ids, weights, parts, out, d, K=k, BLOCK=REDUCE)
    return out
