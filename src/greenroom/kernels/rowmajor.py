"""Row-major float matrix times a few vectors on the GPU: every weight is read once, in its type.

For matrices a file keeps as F32, F16 or BF16; products and sums are float32, without rounding the
activations as a library product of 16-bit operands would.
"""

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two

ROWS = 4  # rows per program
COLUMNS = 512  # columns read at a time


@kernel
def _rowmajor(
    weight,
    x,
    bias,
    out,
    rows,
    cols,
    tokens,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, cols, COLS):
        column = start + tl.arange(0, COLS)
        inside = column < cols
        values = tl.load(
            weight + row[:, None].to(tl.int64) * cols + column[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        activations = tl.load(
            x + token[:, None] * cols + column[None, :],
            mask=(token < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        acc += tl.sum(activations[:, None, :] * values[None, :, :], 2)
    if BIAS:
        acc += tl.load(bias + row, mask=row < rows, other=0.0)[None, :]
    tl.store(
        out + token[:, None] * rows + row[None, :],
        acc,
        mask=(token < tokens)[:, None] & (row < rows)[None, :],
    )


def rowmajor(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of a float matrix.

    Args:
        weight: (rows, cols) float32, float16 or bfloat16, contiguous.
        x: (tokens, cols) float32, contiguous.
        bias: (rows,) float32.

    Returns:
        (tokens, rows) float32.
    """
    rows, cols = weight.shape
    tokens = x.shape[0]
    out = torch.empty(tokens, rows, device=x.device, dtype=torch.float32)
    per_program = min(4, power_of_two(tokens))
    _rowmajor[(-(-rows // ROWS), -(-tokens // per_program))](
        weight, x, x if bias is None else bias, out, rows, cols, tokens, BIAS=bias is not None,
        TOKENS=per_program, ROWS=ROWS, COLS=min(COLUMNS, power_of_two(cols)),
    )  # fmt: skip
    return out


def rowmajor_twin(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rowmajor` in plain torch; the truth it is held against."""
    return torch.nn.functional.linear(x, weight.float(), bias)
