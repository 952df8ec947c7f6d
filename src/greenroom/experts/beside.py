"""Routed experts that stay in RAM while everything else runs on a GPU.

A layer's hidden states and routes are published to pinned memory, the CPU computes its experts
from their slabs, and the sum goes back. Knows nothing of routers or models.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.errors import NativeError
from greenroom.experts.cpu import CpuExperts
from greenroom.kernels.handover import publish


class Mailbox:
    """Pinned buffers one layer after another uses; they grow with the longest step seen.

    Args:
        device: whose steps are served; on "cpu" the memory is not pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._floats = torch.empty(0)  # hidden, result and weights, one after another
        self._ids = torch.empty(0, dtype=torch.int32)

    def _room(self, floats: int, ids: int) -> None:
        if floats <= len(self._floats) and ids <= len(self._ids):
            return
        pin = self.device.type == "cuda"
        if pin:  # the device may still be reading the old buffers
            torch.cuda.synchronize(self.device)
        self._floats = torch.empty(max(floats, 2 * len(self._floats)), pin_memory=pin)
        self._ids = torch.empty(max(ids, 2 * len(self._ids)), dtype=torch.int32, pin_memory=pin)

    def views(self, tokens: int, width: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (tokens, width), ids (tokens, k), weights (tokens, k), result (tokens, width)."""
        values, routes = tokens * width, tokens * k
        self._room(2 * values + routes, routes)
        hidden = self._floats[:values].view(tokens, width)
        result = self._floats[values : 2 * values].view(tokens, width)
        weights = self._floats[2 * values : 2 * values + routes].view(tokens, k)
        return hidden, self._ids[:routes].view(tokens, k), weights, result


class Courier(Protocol):
    """Takes one layer's routed tokens to the CPU and brings the sum back."""

    def send(self, experts: CpuExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Starts; arguments on the device, as those of `CpuExperts.__call__`."""

    def fetch(self) -> Tensor:
        """The sum, (tokens, d) float32 on the device."""


class WaitingCourier:
    """Has the calling thread wait for the device in every layer; works everywhere.

    Args:
        device: where hidden states come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._box = Mailbox(device)
        self._device = device
        event: Any = torch.cuda.Event
        self._event = event() if device.type == "cuda" else None
        self._work: tuple[CpuExperts, tuple[Tensor, Tensor, Tensor]] | None = None

    def send(self, experts: CpuExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See `Courier.send`."""
        if self._work is not None:
            raise NativeError("experts: a layer was started before the one before it was fetched")
        tokens, width = hidden.shape
        there = self._box.views(tokens, width, ids.shape[1])[:3]
        publish(hidden.contiguous(), ids.contiguous(), weights.contiguous(), there)
        if self._event is not None:
            self._event.record()
        self._work = experts, there

    def fetch(self) -> Tensor:
        """See `Courier.fetch`."""
        if self._work is None:
            raise NativeError("experts: a layer was fetched that was not started")
        (experts, arguments), self._work = self._work, None
        if self._event is not None:
            self._event.synchronize()
        tokens, width = arguments[0].shape
        result = self._box.views(tokens, width, arguments[1].shape[1])[3]
        result.copy_(experts(*arguments))
        return result.to(self._device, non_blocking=True, copy=True)


class ExpertsBeside:
    """The experts of one layer: slabs in RAM, computed by the CPU, for hidden states on a device.

    Args:
        cpu: the slabs.
        courier: shared by all layers of a model.
    """

    def __init__(self, cpu: CpuExperts, courier: Courier) -> None:
        self.cpu = cpu
        self._courier = courier

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs."""
        return self.cpu.nbytes

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Begins `__call__`; what the device is given until `finish` runs beside it."""
        self._courier.send(self.cpu, hidden, ids, weights)

    def finish(self) -> Tensor:
        """The result of the last `start`: (tokens, d) float32 on the device."""
        return self._courier.fetch()

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden: (tokens, d) float32 on the device.
            ids: (tokens, k) int32.
            weights: (tokens, k) float32.

        Returns:
            (tokens, d) float32 on the device.
        """
        self.start(hidden, ids, weights)
        return self.finish()
