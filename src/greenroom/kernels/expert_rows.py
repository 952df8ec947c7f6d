"""What stands between the products of one expert and many tokens: rows brought into the range of
float16, the activation with its biases, and the weighted sum into the tokens' rows. Each kernel
has its plain torch twin beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.experts import ACTIVATIONS, activate

RANGE = 8  # the largest number of a row comes to lie from 2^8 to 2^9


@triton.jit
def _power(values):  # of two, such that the largest of values / power is from 2^8 to 2^9
    largest = tl.max(tl.abs(values), 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power < 1e-30, 1.0, power * 0.00390625)


@triton.jit
def _scaled(x, out, scales, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * cols + column, mask=column < cols, other=0.0)
    power = _power(values)
    tl.store(out + row * cols + column, values / power, mask=column < cols)
    tl.store(scales + row, power)


@triton.jit
def _activated(
    gate, up, width, gate_bias, up_bias, row_scales, tokens, out, scales, f,
    BIAS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < f
    scale = tl.load(row_scales + tl.load(tokens + row))
    g = tl.load(gate + row * width + column, mask=live, other=0.0) * scale
    u = tl.load(up + row * width + column, mask=live, other=0.0) * scale
    if BIAS:
        g += tl.load(gate_bias + column, mask=live, other=0.0)
        u += tl.load(up_bias + column, mask=live, other=0.0)
    values = tl.where(live, activate(g, u, KIND), 0.0)
    power = _power(values)
    tl.store(out + row * f + column, values / power, mask=live)
    tl.store(scales + row, power)


@triton.jit
def _add(out, y, tokens, weights, scales, bias, d, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < d
    value = tl.load(y + row * d + column, mask=live, other=0.0) * tl.load(scales + row)
    if BIAS:
        value += tl.load(bias + column, mask=live, other=0.0)
    place = out + tl.load(tokens + row) * d + column
    weight = tl.load(weights + row)
    tl.store(place, tl.load(place, mask=live, other=0.0) + value * weight, mask=live)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, cols) float32 as float16 and a power of two per row, (rows,) float32; x is both's
    product."""
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=torch.float16, device=x.device)
    scales = torch.empty(rows, device=x.device)
    block = triton.next_power_of_2(cols)
    _scaled[(rows,)](x, out, scales, cols, BLOCK=block, num_warps=_warps(block))
    return out, scales


def scaled_rows_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    """`scaled_rows` in plain torch; the truth it is held against."""
    exponent = torch.frexp(x.abs().amax(1))[1] - 1 - RANGE
    power = torch.where(x.abs().amax(1) < 1e-30, 1.0, torch.exp2(exponent.float()))
    return (x / power[:, None]).half(), power


def activated_rows(
    gate: Tensor,
    up: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    row_scales: Tensor,
    tokens: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The activation of scaled products, in the range of float16.

    Args:
        gate, up: (rows, f) float32, columns contiguous, rows equally far apart.
        biases: of gate and up, (f,) float32, or None.
        row_scales: (all tokens,) float32, the factors products lack.
        tokens: (rows,) int64, whose row it is.
        activation: "silu" or "gpt-oss".

    Returns:
        (rows, f) float16 and the power of two of each row, (rows,) float32.
    """
    rows, f = gate.shape
    out = torch.empty(rows, f, dtype=torch.float16, device=gate.device)
    scales = torch.empty(rows, device=gate.device)
    block = triton.next_power_of_2(f)
    gate_bias, up_bias = biases or (gate, gate)
    _activated[(rows,)](
        gate, up, gate.stride(0), gate_bias, up_bias, row_scales, tokens, out, scales, f,
        BIAS=biases is not None, KIND=ACTIVATIONS[activation], BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out, scales


def activated_rows_twin(
    gate: Tensor,
    up: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    row_scales: Tensor,
    tokens: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`activated_rows` in plain torch; the truth it is held against."""
    scale = row_scales[tokens][:, None]
    gate, up = gate * scale, up * scale
    if biases is not None:
        gate, up = gate + biases[0], up + biases[1]
    if activation == "gpt-oss":
        gate = gate.clamp(max=7.0)
        return scaled_rows_twin(gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1))
    return scaled_rows_twin(torch.nn.functional.silu(gate) * up)


def add_rows(
    out: Tensor, y: Tensor, tokens: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None
) -> None:
    """Adds one expert's weighted results to its tokens, none of which comes twice.

    Args:
        out: (all tokens, d) float32.
        y: (rows, d) float32.
        tokens: (rows,) int64.
        weights, scales: (rows,) float32.
        bias: (d,) float32, or None.
    """
    rows, d = y.shape
    _add[(rows, -(-d // 1024))](
        out, y, tokens, weights, scales, y if bias is None else bias, d, BIAS=bias is not None,
        BLOCK=1024,
    )  # fmt: skip


def add_rows_twin(
    out: Tensor, y: Tensor, tokens: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None
) -> None:
    """`add_rows` in plain torch; the truth it is held against."""
    y = y * scales[:, None] + (0.0 if bias is None else bias)
    out.index_add_(0, tokens, y * weights[:, None])
