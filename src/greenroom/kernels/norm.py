"""RMSNorm and LayerNorm on the GPU, with the residual addition that stands before them fused in.

One program per row; statistics in float32. Where a product wants the result in planes of bytes,
they are made here. Knows nothing of what the rows are.
"""

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two
from greenroom.kernels.planes import PLANES, columns_of, room, store_planes

LEAST = 128  # columns of a program: with 32, Triton 3.6 added up permuted ones wrongly on an H100
PER_WARP = 256  # columns: little to do one after another, since a row has one program


@kernel
def _norm(
    x, residual, weight, bias, out, words, units, width, eps, RESIDUAL: tl.constexpr,
    CENTRED: tl.constexpr, ORDER: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = columns_of(tl.arange(0, BLOCK // 4), ORDER)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * width + column, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0)  # before anything waits for sums
    if CENTRED:
        shift = tl.load(bias + column, mask=inside, other=0.0)
    if RESIDUAL:
        tl.store(residual + row * width + column, value, mask=inside)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(tl.sum(value, 1), 0) / width, 0.0)
    spread = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / width + eps)
    value = value * spread * factor
    if CENTRED:
        value += shift
    tl.store(out + row * width + column, value, mask=inside)
    if ORDER > 0:
        store_planes(
            value, words + row * PLANES * (width // 4), units + row * (width // 8), 0, width // 4,
            width // 4, PLANES,
        )  # fmt: skip


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    kind: int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Normalises the rows of `x + residual`; RMSNorm, or LayerNorm where a bias is given.

    Args:
        x: (..., width) float32, contiguous.
        weight, bias: (width,) float32.
        eps: added to the variance.
        residual: shape of x, float32; overwritten with x + residual.
        kind: order of the planes the result is cut into; 0 for none.

    Returns:
        Shape of x, float32; and what `planes.split` makes of it, or None.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x, dtype=torch.float32)
    planes = room(rows, width, x.device) if kind else None
    block = max(LEAST, power_of_two(width))
    _norm[(rows,)](
        x, x if residual is None else residual, weight, weight if bias is None else bias, out,
        *(planes or (out, out)), width, eps, RESIDUAL=residual is not None,
        CENTRED=bias is not None, ORDER=kind, PLANES=PLANES, BLOCK=block,
        num_warps=min(16, max(1, block // PER_WARP)),
    )  # fmt: skip
    return out, planes


def norm_twin(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`norm` in plain torch; the truth it is held against."""
    if residual is not None:
        residual += x
        x = residual
    if bias is not None:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
