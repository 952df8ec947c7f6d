"""What stands between the products of a group of experts and many tokens: rows brought into the
range of float16, the activation with its biases, and the weighted sum into the tokens' rows. Each
kernel has its plain torch twin beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.experts import ACTIVATIONS, activate
from greenroom.kernels.grouped import (
    GROUP,
    PLACE,
    Group,
    Routes,
    members,
    pick,
    room_for,
    rows_of,
)
from greenroom.kernels.launch import kernel, power_of_two

RANGE = 8  # the largest number of a row comes to lie from 2^8 to 2^9
COLUMNS = 1024  # of a sum that a program adds


@triton.jit
def _power(values):  # of two, such that the largest of values / power is from 2^8 to 2^9
    largest = tl.max(tl.abs(values), 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power < 1e-30, 1.0, power * 0.00390625)


@kernel
def _scaled(x, out, scales, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * cols + column, mask=column < cols, other=0.0)
    power = _power(values)
    tl.store(out + row * cols + column, values / power, mask=column < cols)
    tl.store(scales + row, power)


@kernel(do_not_specialize=["first", "count", "skip", "rows"])
def _activated(
    both, memory, slab_bytes, gate_bias, up_bias, row_scales, tokens, starts, table, experts,
    first, count, skip, rows, out, scales, f,
    BIAS: tl.constexpr, KIND: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    expert, low, number, shift = members(starts, table, experts, first, count, skip, rows, PAD)
    chosen = (low <= row) & (row < low + number)
    column = tl.arange(0, BLOCK)
    live = column < f
    scale = tl.load(row_scales + tl.load(tokens + row + pick(shift, chosen)))
    at = row.to(tl.int64) * f
    g = tl.load(both + at * 2 + column, mask=live, other=0.0) * scale
    u = tl.load(both + at * 2 + f + column, mask=live, other=0.0) * scale
    if BIAS:
        place = tl.load(table + 2 * experts + pick(expert, chosen))
        slab = memory + place.to(tl.int64) * slab_bytes
        g += tl.load((slab + gate_bias).to(tl.pointer_type(tl.float32)) + column, mask=live)
        u += tl.load((slab + up_bias).to(tl.pointer_type(tl.float32)) + column, mask=live)
    values = tl.where(live, activate(g, u, KIND), 0.0)
    power = _power(values)
    tl.store(out + at + column, values / power, mask=live)
    tl.store(scales + row, power)


@kernel(do_not_specialize=["number", "skip", "rows"])
def _add(
    out, y, scales, memory, slab_bytes, bias, ids, weights, places, starts, table, experts,
    number, skip, rows, d,
    K: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros((BLOCK,), tl.float32)
    found = 0
    for j in range(K):
        expert = tl.load(ids + token * K + j)
        known = expert >= 0
        expert = tl.maximum(expert, 0)
        known = known & (tl.load(table + 3 * experts + expert) == number)
        row = tl.load(places + token * K + j) - tl.load(starts + expert)
        row += tl.load(table + experts + expert) - skip
        if known & (row >= 0) & (row < rows):
            value = tl.load(y + row.to(tl.int64) * d + column, mask=inside, other=0.0)
            if SCALED:
                value *= tl.load(scales + row)
            if BIAS:
                place = tl.load(table + 2 * experts + expert)
                slab = memory + place.to(tl.int64) * slab_bytes + bias
                value += tl.load(slab.to(tl.pointer_type(tl.float32)) + column, mask=inside)
            total += value * tl.load(weights + token * K + j)
            found += 1
    if found > 0:
        place = out + token * d + column
        tl.store(place, tl.load(place, mask=inside) + total, mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, cols) float32 as float16 and a power of two per row, (rows,) float32; x is both's
    product."""
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=torch.float16, device=x.device)
    scales = torch.empty(rows, device=x.device)
    block = power_of_two(cols)
    _scaled[(rows,)](x, out, scales, cols, BLOCK=block, num_warps=_warps(block))
    return out, scales


def scaled_rows_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    """`scaled_rows` in plain torch; the truth it is held against."""
    exponent = torch.frexp(x.abs().amax(1))[1] - 1 - RANGE
    power = torch.where(x.abs().amax(1) < 1e-30, 1.0, torch.exp2(exponent.float()))
    return (x / power[:, None]).half(), power


def activated_rows(
    both: Tensor,
    slabs: Tensor,
    biases: tuple[int, int] | None,
    row_scales: Tensor,
    routes: Routes,
    group: Group,
    skip: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The activation of a pass's scaled products, in the range of float16.

    Args:
        both: (rows, 2 f) float32, gate's products beside up's.
        slabs: (slabs, bytes) uint8, where `Routes.table` says.
        biases: where in a slab gate's and up's are, (f,) float32, or None.
        row_scales: (tokens,) float32, the factors products lack.
        routes, group: whose rows.
        skip: rows of the group before this pass.
        activation: "silu" or "gpt-oss".

    Returns:
        (rows, f) float16 and the power of two of each row, (rows,) float32.
    """
    rows, f = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, f, dtype=torch.float16, device=both.device)
    scales = torch.empty(rows, device=both.device)
    block = power_of_two(f)
    gate_bias, up_bias = biases or (0, 0)
    _activated[(rows,)](
        both, slabs, slabs.shape[1], gate_bias, up_bias, row_scales, routes.tokens, routes.starts,
        routes.table, routes.table.shape[1], group.first, len(group.counts), skip, rows, out,
        scales, f, BIAS=biases is not None, KIND=ACTIVATIONS[activation],
        PAD=room_for(len(group.counts), routes.table.shape[1]), BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out, scales


def activated_rows_twin(
    both: Tensor,
    slabs: Tensor,
    biases: tuple[int, int] | None,
    row_scales: Tensor,
    routes: Routes,
    group: Group,
    skip: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`activated_rows` in plain torch; the truth it is held against."""
    rows, f = both.shape[0], both.shape[1] // 2
    owner, where = rows_of(routes, group, skip, rows)
    scale = row_scales[routes.tokens[where].long()][:, None]
    gate, up = both[:, :f] * scale, both[:, f:] * scale
    if biases is not None:
        places = routes.table[PLACE, group.experts(routes)].long()[owner]
        gate, up = (x + _bias(slabs, b, f)[places] for x, b in zip((gate, up), biases, strict=True))
    if activation == "gpt-oss":
        gate = gate.clamp(max=7.0)
        return scaled_rows_twin(gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1))
    return scaled_rows_twin(torch.nn.functional.silu(gate) * up)


def _bias(slabs: Tensor, start: int, width: int) -> Tensor:
    return slabs[:, start : start + 4 * width].contiguous().view(torch.float32)


def add_rows(
    out: Tensor,
    y: Tensor,
    scales: Tensor | None,
    slabs: Tensor | None,
    bias: int | None,
    routes: Routes,
    group: Group,
    skip: int,
) -> None:
    """Adds a pass's weighted results to their tokens, each token's in the order of its routes.

    Args:
        out: (tokens, d) float32.
        y: (rows, d) float32, on the device or pinned.
        scales: (rows,) float32 that y lacks, or None.
        slabs: (slabs, bytes) uint8, for the bias.
        bias: where in a slab it is, (d,) float32, or None.
        routes, group: whose rows.
        skip: rows of the group before this pass.
    """
    tokens, d = out.shape
    memory = out if slabs is None or bias is None else slabs
    _add[(tokens, -(-d // COLUMNS))](
        out, y, out if scales is None else scales, memory, memory.shape[1], bias or 0, routes.ids,
        routes.weights, routes.places, routes.starts, routes.table, routes.table.shape[1],
        group.number, skip, len(y), d, K=routes.ids.shape[1], BIAS=bias is not None,
        SCALED=scales is not None, BLOCK=COLUMNS,
    )  # fmt: skip


def add_rows_twin(
    out: Tensor,
    y: Tensor,
    scales: Tensor | None,
    slabs: Tensor | None,
    bias: int | None,
    routes: Routes,
    group: Group,
    skip: int,
) -> None:
    """`add_rows` in plain torch; the truth it is held against."""
    owner, where = rows_of(routes, group, skip, len(y))
    assert (routes.table[GROUP, group.experts(routes)] == group.number).all()
    if scales is not None:
        y = y * scales[:, None]
    if bias is not None and slabs is not None:
        places = routes.table[PLACE, group.experts(routes)].long()[owner]
        y = y + _bias(slabs, bias, y.shape[1])[places]
    weights = torch.empty(routes.weights.numel(), device=out.device)
    weights[routes.places.view(-1).long()] = routes.weights.view(-1)
    out.index_add_(0, routes.tokens[where].long(), y * weights[where][:, None])
