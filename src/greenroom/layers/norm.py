"""RMSNorm and LayerNorm, with the residual addition that stands before them.

Statistics are in float32. Knows neither what is normalised nor which family asks for it.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        x: (..., width) float32.
        weight: (width,) float32.
        eps: added to the mean square.

    Returns:
        Shape of x, float32.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, with the biased variance.

    Args:
        x: (..., width) float32.
        weight, bias: (width,) float32.
        eps: added to the variance.

    Returns:
        Shape of x, float32.
    """
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


class Norm:
    """A norm of the residual stream: RMSNorm, or LayerNorm where `centred`.

    Args:
        weight: (width,) float32.
        bias: (width,) float32 or None.
        eps: added to the variance.
        centred: subtract the mean first (LayerNorm).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.centred = centred

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Adds `delta` to `x` in place, if given, and returns the sum normalised.

        Args:
            x: (..., width) float32, the residual stream.
            delta: shape of x, what the part before this norm computed.

        Returns:
            Shape of x, float32; a new tensor.
        """
        if delta is not None:
            x += delta
        if self.centred:
            return layer_norm(x, self.weight, self.bias, self.eps)
        y = rms_norm(x, self.weight, self.eps)
        return y if self.bias is None else y + self.bias
