"""RMSNorm and LayerNorm on the GPU, with the residual addition that stands before them fused in.

One program per row; statistics in float32. Knows nothing of what the rows are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(
    x,
    residual,
    weight,
    bias,
    out,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * width + column, mask=inside, other=0.0)
        tl.store(residual + row * width + column, value, mask=inside)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value) / width, 0.0)
    spread = tl.rsqrt(tl.sum(value * value) / width + eps)
    value = value * spread * tl.load(weight + column, mask=inside, other=0.0)
    if CENTRED:
        value += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, value, mask=inside)


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalises the rows of `x + residual`; RMSNorm, or LayerNorm where a bias is given.

    Args:
        x: (..., width) float32, contiguous.
        weight, bias: (width,) float32.
        eps: added to the variance.
        residual: shape of x, float32; overwritten with x + residual.

    Returns:
        Shape of x, float32.
    """
    width = x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float32)
    _norm[(x.numel() // width,)](
        x, x if residual is None else residual, weight, weight if bias is None else bias, out,
        width, eps, RESIDUAL=residual is not None, CENTRED=bias is not None,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


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
