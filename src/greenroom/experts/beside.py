"""Routed experts in RAM beside a GPU that runs everything else.

A layer's hidden states and routes are published to pinned memory, the CPU computes its experts
from their slabs, and the sum goes back. Experts with a slot in VRAM are left to the GPU, and a
long step may be left to a stream of weights. Knows nothing of routers or models.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.errors import NativeError
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import SHORT_STEP
from greenroom.kernels.guests import Guests, choose_guests, fetch
from greenroom.kernels.handover import publish
from greenroom.kernels.planes import Cutter


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


class Slots(Protocol):
    """Experts of one layer that live in VRAM.

    Attributes:
        table: (experts,) int32 on the device: an expert's slot, or -1 if it has none. Its values
            change between steps only, its address never.
        full: whether every expert has a slot; then none ever leaves.
        cut: cuts hidden states into planes.
    """

    table: Tensor
    full: bool
    cut: Cutter

    def takes(self, routes: int) -> bool:
        """Whether `many` computes steps of so many routes, only if `full`."""

    def many(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`hits` for a long step."""

    def passed_by(self, ids: Tensor) -> None:
        """A long step is left to the CPU, with these routes (tokens, k) int32."""

    def hits(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, guests: Guests | None = None
    ) -> Tensor:
        """The sum over the routes whose expert has a slot or is a guest; part of a captured step,
        so without waiting for the device.

        Args:
            hidden: (tokens, d) float32 on the device.
            ids: (tokens, k) int32 on the device; -1 for rows that only pad the batch.
            weights: (tokens, k) float32 on the device.
            guests: of this step, or None.

        Returns:
            (tokens, d) float32 on the device.
        """


class Bus(Protocol):
    """Brings experts in RAM over the bus in short steps, see `kernels.guests`.

    Attributes:
        cut: as that of `Slots`.
    """

    cut: Cutter

    def guests(self, tokens: int) -> Guests | None:
        """Those of a step of so many tokens; None if there are never any."""

    def hits(self, hidden: Tensor, ids: Tensor, weights: Tensor, guests: Guests) -> Tensor:
        """As `Slots.hits`, of a layer without slots."""


class Stream(Protocol):
    """Computes a long step of one layer without the CPU: weights come to the device."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `ExpertsBeside.__call__`."""

    def abandon(self) -> None:
        """Forgets what a step that failed had begun."""


class Courier(Protocol):
    """Takes one layer's routed tokens to the CPU and brings the sum back.

    Attributes:
        records: whether steps that use it can be recorded and replayed.
    """

    records: bool

    def recording(self, layers: Sequence[CpuExperts]) -> AbstractContextManager[None]:
        """Within it, steps that use `layers`, in this order, can be recorded.

        Raises:
            NativeError: they cannot.
        """

    def answering(self, tokens: int) -> AbstractContextManager[None]:
        """Within it, one step of so many tokens that was recorded, or could be, is given to the
        device; returns when the CPU has done its part.

        Raises:
            NativeError: the step has failed.
        """

    def send(
        self,
        experts: CpuExperts,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        table: Tensor | None,
        guests: Guests | None = None,
    ) -> Tensor:
        """Starts; arguments on the device, as those of `CpuExperts.__call__`.

        Args:
            table: of `Slots`; routes whose expert has a slot do not go to the CPU.
            guests: who they are is decided by this; neither do their routes.

        Returns:
            The ids, with -1 for rows that only pad the batch.
        """

    def abandon(self) -> None:
        """Forgets a layer that was sent and will not be fetched."""

    def fetch(self, hits: Tensor | None, shared: Tensor | None) -> Tensor:
        """The CPU's sum plus what the device computed, (tokens, d) float32 on the device."""


class WaitingCourier:
    """Has the calling thread wait for the device in every layer; works everywhere.

    Args:
        device: where hidden states come from.
    """

    records = False

    def __init__(self, device: torch.device) -> None:
        self._box = Mailbox(device)
        self._device = device
        event: Any = torch.cuda.Event
        self._event = event() if device.type == "cuda" else None
        self._work: tuple[CpuExperts, tuple[Tensor, Tensor, Tensor]] | None = None

    def recording(self, layers: Sequence[CpuExperts]) -> AbstractContextManager[None]:
        """See `Courier.recording`."""
        if layers:
            raise NativeError("experts: a step in which the host waits cannot be recorded")
        return nullcontext()

    def answering(self, tokens: int) -> AbstractContextManager[None]:
        """See `Courier.answering`."""
        return nullcontext()

    def send(
        self,
        experts: CpuExperts,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        table: Tensor | None,
        guests: Guests | None = None,
    ) -> Tensor:
        """See `Courier.send`."""
        if self._work is not None:
            raise NativeError("experts: a layer was started before the one before it was fetched")
        tokens, width = hidden.shape
        there = self._box.views(tokens, width, ids.shape[1])[:3]
        mine = ids = ids.contiguous()
        if guests is not None:
            mine, table = choose_guests(ids, table, guests), None
        publish(hidden.contiguous(), mine, weights.contiguous(), there, table)
        if self._event is not None:
            self._event.record()
        self._work = experts, there
        return ids

    def abandon(self) -> None:
        """See `Courier.abandon`."""
        self._work = None

    def fetch(self, hits: Tensor | None, shared: Tensor | None) -> Tensor:
        """See `Courier.fetch`."""
        if self._work is None:
            raise NativeError("experts: a layer was fetched that was not started")
        (experts, arguments), self._work = self._work, None
        if self._event is not None:
            self._event.synchronize()
        tokens, width = arguments[0].shape
        result = self._box.views(tokens, width, arguments[1].shape[1])[3]
        result.copy_(experts(*arguments))
        total = result.to(self._device, non_blocking=True, copy=True)
        for part in (hits, shared):
            if part is not None:
                total += part
        return total


class ExpertsBeside:
    """The experts of one layer: slabs in RAM, computed by the CPU, for hidden states on a device.

    Args:
        cpu: the slabs.
        courier: shared by all layers of a model.
        slots: this layer's experts in VRAM, or None.
        stream: computes steps of more than `FEW` tokens, or None for the CPU.

    Attributes:
        bus: brings guests, if it pays.
    """

    FEW = SHORT_STEP

    def __init__(
        self,
        cpu: CpuExperts,
        courier: Courier,
        slots: Slots | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.cpu = cpu
        self.slots = slots
        self.stream = stream
        self.bus: Bus | None = None
        self._courier = courier
        self._hits: Tensor | None = None
        self._done: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs."""
        return self.cpu.nbytes

    @property
    def crosses(self) -> bool:
        """Whether a short step needs the CPU."""
        return self.slots is None or not self.slots.full

    @property
    def waits(self) -> bool:
        """Whether the host has to wait in a short step."""
        return self.crosses and not self._courier.records

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Begins `__call__`; what the device is given until `finish` runs beside it."""
        slots, long = self.slots, hidden.shape[0] > self.FEW
        if long and slots is not None and slots.takes(ids.numel()):
            self._done = slots.many(hidden, ids, weights)
            return
        if long and self.stream is not None:
            self._done = self.stream(hidden, ids, weights)
            return
        if slots is not None and slots.full:  # nothing is left for the CPU
            self._done = slots.hits(hidden, ids, weights)
            return
        if long and slots is not None:  # no memory is planned for so much of the slots' kernels
            slots.passed_by(ids)
            slots = None
        bus = None if long else self.bus
        guests = None if bus is None else bus.guests(len(hidden))
        table = None if slots is None else slots.table
        live = self._courier.send(self.cpu, hidden, ids, weights, table, guests)
        if guests is not None:
            fetch(guests)
        if slots is not None:
            self._hits = slots.hits(hidden, live, weights, guests)
        elif bus is not None and guests is not None:
            self._hits = bus.hits(hidden, live, weights, guests)

    def abandon(self) -> None:
        """Forgets a `start` whose step failed before `finish`."""
        self._done = self._hits = None
        if self.stream is not None:
            self.stream.abandon()
        self._courier.abandon()

    def finish(self, shared: Tensor | None = None) -> Tensor:
        """The result of the last `start` plus `shared`: (tokens, d) float32 on the device."""
        if self._done is not None:
            total, self._done = self._done, None
            return total if shared is None else total.add_(shared)
        hits, self._hits = self._hits, None
        return self._courier.fetch(hits, shared)

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
