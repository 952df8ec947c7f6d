"""Where the experts of a model may be besides RAM: slots in VRAM, and staging slabs for those on
their way through it in long steps, or coming over the bus in short ones. Put together once all
layers are loaded, because only then their layouts are known. Knows memory; not policy.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from greenroom.experts.beside import ExpertsBeside
from greenroom.experts.bus import Bus, LayerBus
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.errands import Errands
from greenroom.experts.limits import BESIDE_STAGED, STREAMED, pages_of
from greenroom.experts.pace import measure, measure_rates
from greenroom.experts.pinned import register
from greenroom.experts.quota import Pace
from greenroom.experts.ring import Ring
from greenroom.experts.share import Share
from greenroom.experts.slots import LayerSlots, Slots
from greenroom.experts.stream import Desk, LayerStream
from greenroom.experts.uselog import Account

log = logging.getLogger(__name__)

LEAST_STAGED = 2  # pages: one arrives while the other is computed


class Tiers:
    """The expert tiers of one model on one device.

    Args:
        account: books the memory.
        slot_bytes: for slots; 0 for none.
        staging_bytes: for staged pages of experts and some expanded ones; 0 leaves long steps to
            the CPU.
        heat: (layers, experts), how much each expert was in demand, if that is known; of more
            layers than this device computes, it is the last that count.
        used: experts of a token; 0 if that is not known.
        chunk: most tokens of a step; 0 if that is not known.
    """

    def __init__(
        self,
        account: Account,
        slot_bytes: int = 0,
        staging_bytes: int = 0,
        heat: NDArray[np.floating] | None = None,
        used: int = 0,
        chunk: int = 0,
    ) -> None:
        self._account, self._heat = account, heat
        self._used, self._chunk = used, chunk
        self.share = Share()  # says what the CPU takes of long steps, once that was measured
        self._slot_bytes, self._staging_bytes = slot_bytes, staging_bytes
        self._layers: list[ExpertsBeside] = []
        self._places: list[int] = []  # of each, among all that were added
        self._added = 0
        self._pins: list[Future[None]] = []
        self._worker: ThreadPoolExecutor | None = None
        self._staged = 0  # bytes of staging slabs and their scratch
        self._errands: Errands | None = None
        self._bus: Bus | None = None
        self.slots: Slots | None = None

    def add(self, experts: ExpertsBeside) -> None:
        """Takes in the next layer, unless its slabs differ in size or layout: such a layer stays
        in RAM. Slabs are pinned in the background."""
        self._added += 1
        if not experts.cpu.uniform:
            return
        self._places.append(self._added - 1)
        self._layers.append(experts)
        moving = self._slot_bytes or self._staging_bytes
        if self._account.device.type == "cuda" and moving and experts.cpu.block is not None:
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="pin")
            self._pins.append(self._worker.submit(pin, experts.cpu))

    def complete(self) -> None:
        """All layers are there: allocates and fills what the sizes allow."""
        for pinned in self._pins:
            pinned.result()
        if self._worker is not None:
            self._worker.shutdown()
        banks = [layer.cpu for layer in self._layers]
        if not banks:
            return
        if self._slot_bytes >= min(bank.layout.nbytes for bank in banks):
            heat = None if self._heat is None else self._heat[-self._added :][self._places]
            self.slots = Slots(self._account, banks, self._slot_bytes, heat, self._chunk)
            for layer, slots in zip(self._layers, self.slots.layers, strict=True):
                layer.slots = slots
        self._stage(banks)

    def rehearse(self) -> None:
        """Measures what bus and CPU take, with nothing else that loads running, and shares the
        experts in RAM among them; not where a GPU cannot read what is in RAM."""
        banks = [layer.cpu for layer in self._layers if layer.crosses]
        if self._bus is None or not self._used or not all(bank.pinned for bank in banks):
            return
        if not banks:  # all experts are in VRAM
            return
        try:
            pace = measure(banks, self._used, self._bus.staging)
            rates = measure_rates(banks[-1], self._bus.staging)
        except Exception as error:  # the model works without, whatever failed
            log.warning("the GPU leaves experts in RAM to the CPU: %.200r", error)
            return
        self.share_bus(pace)
        self.share.rates = rates
        if self.slots is not None:
            self.slots.bus = rates.bus

    def share_bus(self, pace: Pace) -> None:
        """Short steps from now on have the device read some of the experts in RAM, as the pace
        says; there must be some, and staging memory."""
        assert self._bus is not None
        sharing = [layer for layer in self._layers if layer.crosses]
        self._bus.decide(pace, [layer.cpu for layer in sharing], self._used)
        if self._bus.ever:
            log.info("%s", self._bus.plan(self._used))
        for layer in sharing:
            layer.bus = LayerBus(self._bus, layer.cpu)

    def begin(self, tokens: int) -> None:
        """A step of so many tokens begins, but for one that is replayed: if it is a long one, its
        first experts set off."""
        self.settle()
        if self.slots is not None:
            self.slots.log.begin()
        stream = self._layers[0].stream if self._layers else None
        if isinstance(stream, LayerStream) and tokens > ExpertsBeside.FEW:
            stream.begin(tokens)

    def report(self) -> dict[str, Any]:
        """See `Slots.report`; "bus" says in one line who comes over it in short steps."""
        found = {} if self.slots is None else self.slots.report()
        if self._bus is not None and self._bus.ever:
            found["bus"] = self._bus.plan(self._used)
        return found

    def settle(self) -> None:
        """Returns when the CPU has done its part of a long step, see `Errands.settle`."""
        if self._errands is not None:
            self._errands.settle()

    def relieve(self) -> int:
        """After an allocation failed: gives back half of the slots, or the staging slabs where
        there are no slots to give. Long steps are the CPU's then.

        Returns:
            Bytes that are free now; 0 if nothing is left.
        """
        freed = 0 if self.slots is None else self.slots.shrink()
        if freed or not self._staged:
            return freed
        if self._account.device.type == "cuda":  # copies of the step that failed may be under way
            torch.cuda.synchronize(self._account.device)
        for layer in self._layers:
            layer.stream = layer.bus = None
        self._errands = self._bus = None
        freed, self._staged = self._staged, 0
        self._account.release("staging", freed)
        torch.cuda.empty_cache()
        return freed

    def _stage(self, banks: Sequence[CpuExperts]) -> None:
        numbers = 2 * max(bank.layout.d * bank.layout.f for bank in banks)
        slab = max(bank.layout.nbytes for bank in banks)
        experts = max(bank.experts for bank in banks)
        room = self._staging_bytes - BESIDE_STAGED * experts
        pages, slabs = pages_of(room, slab, 2 * numbers, experts)
        if pages < LEAST_STAGED:
            return
        pages = min(pages, len(banks) * -(-experts // slabs) + 1)
        scratch = self._account.empty("staging", [slabs * numbers], torch.float16)
        table = self._account.empty("staging", [BESIDE_STAGED // 4, experts], torch.int32)
        quota, places = table[STREAMED // 4 : -1], table[-1]
        memory = self._account.empty("staging", [pages, slabs * slab], torch.uint8)
        ring, self._bus = Ring(memory, slabs), Bus(quota, places, memory.view(-1))
        self._staged = scratch.nbytes + table.nbytes + memory.nbytes
        none: list[LayerSlots | None] = [None] * len(banks)
        self._errands = Errands(self._account.device, banks)
        streamed = table[: STREAMED // 4].view(-1)
        desk = Desk(streamed, scratch, self._used, self.share, self._errands, self._chunk)
        before: LayerStream | None = None
        for layer, seats in zip(
            self._layers, none if self.slots is None else self.slots.layers, strict=True
        ):
            layer.stream = before = LayerStream(ring, layer.cpu, desk, seats, before)


def pin(experts: CpuExperts) -> None:
    """Registers a layer's slabs for copies at the bus's full rate; a failure costs speed only."""
    assert experts.block is not None
    if experts.pinned:
        return
    error = register(experts.block, experts)
    experts.pinned = not error
    if error:
        log.warning("experts could not be pinned (CUDA error %d): copies will be slow", error)
