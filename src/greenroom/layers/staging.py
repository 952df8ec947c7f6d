"""Inputs of a recorded step: memory the host writes, and its twin on the device, which the graph
reads. One kernel brings over all of them: a copy command would wait for experts on their way to
slots. Knows shapes, not what they mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16  # bytes: what the widest load of a kernel wants


class Staging:
    """Room for tensors like those given; their values are there at once.

    The host has two copies in turn: it may write the next step's while the last ones travel.

    Args:
        device: where the twin is; in RAM the memory is not pinned.
        like: tensors in RAM.

    Attributes:
        here: an array to write for each tensor; others after each `send`.
        there: what `send` makes of it on the device.
    """

    def __init__(self, device: torch.device, like: Sequence[Tensor]) -> None:
        starts, end = [], 0
        for part in like:
            starts.append(end)
            end += -(-part.nbytes // ALIGNED) * ALIGNED
        self._pinned = device.type == "cuda"
        size, kind = [end // 4], torch.int32
        self._hosts = [torch.empty(size, dtype=kind, pin_memory=self._pinned) for _ in range(2)]
        self._device = torch.empty(size, dtype=kind, device=device)

        def views(whole: Tensor) -> list[Tensor]:
            whole = whole.view(torch.uint8)
            return [
                whole[start : start + part.nbytes].view(part.dtype).view(part.shape)
                for part, start in zip(like, starts, strict=True)
            ]

        self.there = views(self._device)
        self._views = [[part.numpy() for part in views(host)] for host in self._hosts]
        self.here: list[NDArray[Any]] = self._views[0]
        for place, part in zip(self.here, like, strict=True):
            place[...] = part.numpy()
        self.send()

    def send(self) -> None:
        """Copies all of it. What `here` is afterwards was copied by the send before this one,
        which the device must have passed."""
        if self._pinned:
            from greenroom.kernels.carry import carry  # in RAM nothing needs Triton

            carry(self._hosts[0], self._device)
        else:
            self._device.copy_(self._hosts[0])
        self._hosts.reverse()
        self._views.reverse()
        self.here = self._views[0]
