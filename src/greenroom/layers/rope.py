"""Rotary position embedding: inverse frequencies with their scalings, and the rotation.

A `Rope` is a table of frequencies, a magnitude and a pairing. Which scaling a model uses is
decided in `models`; formulas follow the YaRN and LongRoPE papers as the publishers apply them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def inverse_frequencies(rotated: int, base: float) -> Tensor:
    """`base^(-2i/rotated)`: (rotated / 2,) float64, radians per position."""
    exponent = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    return torch.pow(torch.tensor(base, dtype=torch.float64), -exponent)


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's parameters (arXiv 2309.00071).

    Attributes:
        factor: how many times longer than `original` the context became.
        original: context length of the pre-training, tokens.
        beta_fast, beta_slow: turns within `original` above which a frequency is kept, below
            which it is divided by `factor`.
        rounded: round the bounds of the ramp outwards to whole dimensions.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rounded: bool = True

    def bounds(self, rotated: int, base: float) -> tuple[float, float]:
        """Indices between which frequencies are mixed."""
        low, high = (
            rotated * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.rounded:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, rotated - 1)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        """Mixes kept and interpolated frequencies: (rotated / 2,) float64."""
        low, high = self.bounds(2 * len(frequencies), base)
        index = torch.arange(len(frequencies), dtype=torch.float64)
        # 0.001 as in the published code, against a ramp of no width.
        ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequencies * ((1 - ramp) + ramp / self.factor)

    @property
    def magnitude(self) -> float:
        """Factor of the rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


class Rope:
    """A rotary embedding, ready to be applied.

    Args:
        frequencies: (rotated / 2,) radians per position; kept as float32.
        magnitude: factor on cosine and sine.
        neox: pairs are (i, i + rotated / 2); otherwise (2i, 2i + 1).
    """

    def __init__(self, frequencies: Tensor, magnitude: float, neox: bool) -> None:
        self.frequencies = frequencies.to(torch.float32)
        self.magnitude = magnitude
        self.neox = neox

    def angles(self, positions: Tensor) -> Tensor:
        """Cosines and sines, times the magnitude: (tokens, 2, rotated / 2) float32.

        Args:
            positions: (tokens,) int64.
        """
        # float64: at position 100,000 float32 would lose three digits of the phase.
        angle = positions[:, None].double() * self.frequencies.double()
        return (torch.stack([angle.cos(), angle.sin()], 1) * self.magnitude).float()


def rotate(x: Tensor, angles: Tensor, neox: bool) -> Tensor:
    """Rotates the first channels of every head; the rest pass through.

    Args:
        x: (tokens, heads, width) float32.
        angles: (tokens, 2, rotated / 2) float32 from `Rope.angles`, rotated <= width.
        neox: pairs are (i, i + rotated / 2); otherwise (2i, 2i + 1).

    Returns:
        Shape of x, float32; a new tensor.
    """
    half = angles.shape[-1]
    cosine, sine = angles[:, :1], angles[:, 1:]  # (tokens, 1, half)
    if neox:
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)
    else:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], -1)
