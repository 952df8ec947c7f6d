"""The linear layer in plain torch: a dequantised float32 matrix and an optional bias.

The truth the packed kernels are held against. Knows neither files nor families.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from greenroom.layers.weight import Weight


class Linear:
    """`x @ weight.T + bias` in float32.

    Args:
        weight: (rows, cols), rows = output features.
        bias: (rows,) float32 or None.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.weight = weight.float32()
        self.bias = bias

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (tokens, cols) float32 to (tokens, rows) float32."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Linears:
    """Several matrices that read the same input, such as query, key and value.

    Args:
        weights: each (rows_i, cols).
        biases: each (rows_i,) float32 or None.
    """

    def __init__(self, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> None:
        self.parts = [Linear(w, b) for w, b in zip(weights, biases, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and biases."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (tokens, cols) float32 to one (tokens, rows_i) float32 per matrix."""
        return tuple(part(x) for part in self.parts)
