"""Experts that sit in VRAM slots, for steps of a few tokens: every route whose expert the table
finds is computed from its slab; the others are left alone. Shapes do not depend on the routes and
nothing waits for the host, so the launches can be captured in a graph. Knows slabs, not policy.
"""

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.lines import Walk, rows_product
from greenroom.kernels.matvec import iq4_table

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
def _gate_up(
    memory, table, ids, seen, x, inner, iq4, slab_bytes, d, f, up_at, gate_bias, up_bias,
    g_group, g_payload, g_lines, u_group, u_payload, u_lines, K: tl.constexpr, G: tl.constexpr,
    U: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SEEN: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0)
    expert = tl.load(ids + route)
    if SEEN:
        tl.store(seen + route, expert, mask=tl.program_id(1) == 0)
    slot = tl.load(table + tl.maximum(expert, 0))
    if (expert < 0) | (slot < 0):
        return
    slab = memory + slot.to(tl.int64) * slab_bytes
    token = x + (route // K).to(tl.int64) * d
    gate = rows_product(slab, iq4, token, d, g_group, g_payload, g_lines, G, LINES)
    up = rows_product(slab + up_at, iq4, token, d, u_group, u_payload, u_lines, U, LINES)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    if BIAS:
        biases = slab.to(tl.pointer_type(tl.float32))
        gate += tl.load(biases + gate_bias // 4 + row, mask=row < f, other=0.0)
        up += tl.load(biases + up_bias // 4 + row, mask=row < f, other=0.0)
    tl.store(inner + route * f + row, activate(gate, up, ACTIVATION), mask=row < f)


@triton.jit
def _down(
    memory, table, ids, inner, out, iq4, slab_bytes, d, f, down_at, bias_at, group_bytes,
    payload_bytes, lines, C: tl.constexpr, BIAS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    route = tl.program_id(0)
    expert = tl.load(ids + route)
    slot = tl.load(table + tl.maximum(expert, 0))
    if (expert < 0) | (slot < 0):
        return
    slab = memory + slot.to(tl.int64) * slab_bytes
    y = rows_product(
        slab + down_at, iq4, inner + route.to(tl.int64) * f, f, group_bytes, payload_bytes, lines,
        C, LINES,
    )  # fmt: skip
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    if BIAS:
        biases = slab.to(tl.pointer_type(tl.float32))
        y += tl.load(biases + bias_at // 4 + row, mask=row < d, other=0.0)
    tl.store(out + route.to(tl.int64) * d + row, y, mask=row < d)


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
    d, f = layout.d, layout.f
    walks = [Walk.of(int(kind), cols) for kind, cols in zip(layout.types, (d, d, f), strict=True)]
    biases = layout.biases
    (gate_bias, _), (up_bias, _), (down_bias, _) = biases or ((0, 0),) * 3
    inner = torch.empty(tokens * k, f, device=hidden.device)
    parts = torch.empty(tokens * k, d, device=hidden.device)
    out = torch.empty(tokens, d, device=hidden.device)
    iq4 = iq4_table(hidden.device)
    gate, up, down = walks
    log = ids if seen is None else seen
    _gate_up[(tokens * k, -(-f // 16))](
        memory, table, ids, log, hidden, inner, iq4, layout.nbytes, d, f, layout.matrices[1][0],
        gate_bias, up_bias, gate.group_bytes, gate.payload_bytes, gate.lines, up.group_bytes,
        up.payload_bytes, up.lines, K=k, G=gate.constants, U=up.constants, BIAS=biases is not None,
        ACTIVATION=ACTIVATIONS[activation], SEEN=seen is not None, LINES=LINES, num_warps=WARPS,
    )  # fmt: skip
    _down[(tokens * k, -(-d // 16))](
        memory, table, ids, inner, parts, iq4, layout.nbytes, d, f, layout.matrices[2][0],
        down_bias, down.group_bytes, down.payload_bytes, down.lines, C=down.constants,
        BIAS=biases is not None, LINES=LINES, num_warps=WARPS,
    )  # fmt: skip
    _reduce[(tokens, -(-d // REDUCE))](table, ids, weights, parts, out, d, K=k, BLOCK=REDUCE)
    return out
