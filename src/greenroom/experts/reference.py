"""The expert MLPs in plain torch, float32: the truth every expert store is held against.

Knows matrices and activations; not where the values came from nor how tokens were routed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GPT_OSS_ALPHA = 1.702  # constants of openai/gpt-oss; its files do not carry them
GPT_OSS_LIMIT = 7.0


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return torch.nn.functional.silu(gate) * up


def clamped_product(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss: `g * sigmoid(1.702 g) * (u + 1)`, g at most 7, u between -7 and 7."""
    gate = gate.clamp(max=GPT_OSS_LIMIT)
    up = up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
    return gate * torch.sigmoid(GPT_OSS_ALPHA * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": silu_product,
    "gpt-oss": clamped_product,
}

Biases = tuple[Tensor, Tensor, Tensor]


class ReferenceExperts:
    """The routed experts of one layer, dequantised.

    Args:
        gate, up: (experts, f, d) float32.
        down: (experts, d, f) float32.
        biases: of gate and up (experts, f) and down (experts, d), or None.
        activation: "silu" or "gpt-oss".
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        biases: Biases | None = None,
        activation: str = "silu",
    ) -> None:
        self.gate = gate
        self.up = up
        self.down = down
        self.biases = biases
        self.activation = ACTIVATIONS[activation]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices and biases."""
        return sum(t.nbytes for t in (self.gate, self.up, self.down, *(self.biases or ())))

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden: (tokens, d) float32.
            ids: (tokens, k) int32.
            weights: (tokens, k) float32.

        Returns:
            (tokens, d) float32.
        """
        out = torch.zeros_like(hidden)
        for expert in torch.unique(ids).tolist():
            token, place = torch.where(ids == expert)
            share = self.one(expert, hidden[token]) * weights[token, place, None]
            out.index_add_(0, token, share)
        return out

    def one(self, expert: int, x: Tensor) -> Tensor:
        """One expert's MLP: (tokens, d) float32 to (tokens, d) float32."""
        gate, up, down = (None if self.biases is None else self.biases[i][expert] for i in range(3))
        linear = torch.nn.functional.linear
        inner = self.activation(linear(x, self.gate[expert], gate), linear(x, self.up[expert], up))
        return linear(inner, self.down[expert], down)
