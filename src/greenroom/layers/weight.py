"""A weight as the file stores it: a type and raw rows, before any backend has prepared it.

Several views of one tensor (an expert's slice, the halves of a fused matrix) are weights too.
Knows blocks only, not what the rows mean.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from greenroom.experts.slabs import MixedMatrices
from greenroom.gguf import GGMLType, dequantize


@dataclass(frozen=True, slots=True)
class Weight:
    """Rows of one matrix, or of the matrices of all experts in one tensor.

    Attributes:
        name: the tensor's name in the file, for messages.
        type: the blocks' format.
        raw: (rows, row_bytes) or (experts, rows, row_bytes) uint8, usually a view of the file.
    """

    name: str
    type: GGMLType
    raw: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols) or (experts, rows, cols) in elements."""
        cols = self.raw.shape[-1] // self.type.block_bytes * self.type.block_size
        return (*self.raw.shape[:-1], cols)

    def rows(self, start: int, stop: int | None = None, step: int = 1) -> "Weight":
        """The rows of this slice, of every expert if it is a stack; shares the bytes."""
        return Weight(self.name, self.type, self.raw[..., start:stop:step, :])

    def float32(self) -> Tensor:
        """The values, `shape` float32, in memory of their own."""
        return torch.from_numpy(np.array(dequantize(self.type, self.raw), np.float32, copy=True))


@dataclass(frozen=True, slots=True)
class WeightStack:
    """The matrices of all experts, each in a tensor of its own, of one type and shape.

    Attributes:
        name: the first tensor's name, for messages.
        type: the blocks' format.
        raw: of each expert (rows, row_bytes) uint8.
    """

    name: str
    type: GGMLType
    raw: list[npt.NDArray[np.uint8]]

    def float32(self) -> Tensor:
        """The values, (experts, rows, cols) float32, in memory of their own."""
        return torch.stack([Weight(self.name, self.type, raw).float32() for raw in self.raw])


class MixedStack(MixedMatrices):
    """The matrices of all experts, each in the type of its class, all of one shape."""

    __slots__ = ()

    def float32(self) -> Tensor:
        """The values, (experts, rows, cols) float32, in memory of their own."""
        parts = zip(self.types, self.raw, strict=True)
        return torch.stack([Weight(self.name, type, raw).float32() for type, raw in parts])
