"""The account of a device's memory: every lasting tensor is booked under the part it serves.

A budget that a booking would exceed is refused before anything is allocated. Knows bytes and
names of parts, not what is computed with them.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from greenroom.errors import BudgetError

SCRATCH_BYTES = 64 << 20  # of expanded rows, shared by all matrices


class Ledger:
    """Books tensors on one device.

    Args:
        device: where they live.
        budget: bytes that may be booked, None for no limit.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device = device
        self.budget = budget
        self.parts: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """Bytes booked."""
        return sum(self.parts.values())

    def book(self, part: str, nbytes: int) -> None:
        """Takes bytes out of the budget.

        Raises:
            BudgetError: they do not fit.
        """
        if self.budget is not None and self.used + nbytes > self.budget:
            raise BudgetError(
                f"{part} needs {nbytes / 2**20:.1f} MiB of VRAM, but of the budget of "
                f"{self.budget / 2**20:.1f} MiB {self.used / 2**20:.1f} MiB are taken; "
                "raise --vram or lower --context"
            )
        self.parts[part] += nbytes

    def release(self, part: str, nbytes: int) -> None:
        """Gives booked bytes back."""
        self.parts[part] -= nbytes

    def empty(self, part: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape on the device, its values unset."""
        tensor = torch.empty(*shape, dtype=dtype, device="meta")
        self.book(part, tensor.nbytes)
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def place(self, part: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the device, contiguous."""
        there = self.empty(part, tensor.shape, tensor.dtype)
        return there.copy_(tensor)
