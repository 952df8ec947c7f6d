"""Inputs of a recorded step: memory the host writes, and its twin on the device, which the graph
reads. One copy command brings over all of them. Knows shapes, not what they mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16  # bytes: what the widest load of a kernel wants


class Staging:
    """Room for tensors like those given; their values are there at once.

    Args:
        device: where the twin is; in RAM the memory is not pinned.
        like: tensors in RAM.

    Attributes:
        here: an array to write for each tensor.
        there: what `send` makes of it on the device.
    """

    def __init__(self, device: torch.device, like: Sequence[Tensor]) -> None:
        starts, end = [], 0
        for part in like:
            starts.append(end)
            end += -(-part.nbytes // ALIGNED) * ALIGNED
        self._host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.empty(end, dtype=torch.uint8, device=device)
        self.here: list[NDArray[Any]] = []
        self.there: list[Tensor] = []
        for part, start in zip(like, starts, strict=True):
            here, there = (
                whole[start : start + part.nbytes].view(part.dtype).view(part.shape)
                for whole in (self._host, self._device)
            )
            here.copy_(part)
            self.here.append(here.numpy())
            self.there.append(there)
        self.send()

    def send(self) -> None:
        """Copies all of it; nothing may be written until the device has passed this point."""
        self._device.copy_(self._host, non_blocking=True)
