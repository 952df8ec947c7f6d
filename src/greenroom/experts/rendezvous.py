"""Brings recorded steps and the CPU's experts together without the host in between: mailboxes in
pinned memory, a native thread that answers them, and a watchdog over both.

Plain steps go the way of `WaitingCourier`; so does everything where a trial shows that the two
processors do not see each other's writes in time. Knows nothing of how steps are recorded.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom import native
from greenroom.errors import NativeError
from greenroom.experts.beside import Courier, WaitingCourier
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.limits import SHORT_STEP
from greenroom.kernels.guests import Guests
from greenroom.kernels.rendezvous import LIMIT_MS, STATE_WORDS, Box, collect, ring

WORDS = 16  # a bell has a cache line to itself
PATIENCE = 10.0  # seconds until the native thread calls a bell that does not ring a failure
SECONDS = 15.0  # for one layer on the CPU; the device waits LIMIT_MS, which is longer
CHECK = 1.0  # seconds between looks at how far a slow step is
TRIAL_MS = 1000  # a working machine needs about 10 us
LAST = 2**31 - 1  # number of a step
FAILED = -(2**31)  # bit 31 of a bell

log = logging.getLogger(__name__)


class Desk:
    """The mailboxes of some layers and the native thread behind them.

    Args:
        device: whose steps are served; on "cpu" the memory is not pinned.
        layers: in the order in which a step comes to them; all slabs in memory.
        tokens: of the longest step.
        k: routes of a token.

    Raises:
        NativeError: layers differ in width, or have experts that are not in memory.
    """

    def __init__(
        self, device: torch.device, layers: Sequence[CpuExperts], tokens: int, k: int
    ) -> None:
        self.layers = list(layers)
        if not layers or len({cpu.layout.d for cpu in layers}) != 1:
            raise NativeError("experts: layers of several widths cannot share mailboxes")
        if not all(cpu.complete for cpu in layers):
            raise NativeError("experts: a recorded step needs all experts in memory")
        self._device, self._number, self._began = device, 0, 0.0
        self.state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
        pin, count, d = device.type == "cuda", len(layers), layers[0].layout.d

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        self._boxes = (
            zeros(count, tokens, d), zeros(count, tokens, k, dtype=torch.int32),
            zeros(count, tokens, k), zeros(count, tokens, d),
        )  # fmt: skip
        bells = zeros(2 * count + 1, WORDS, dtype=torch.int32)
        self._ring, self._done, self._source = bells[:count], bells[count : 2 * count], bells[-1]
        self._words = bells.numpy()  # as the host reads and writes them
        self._native = native.lib().Rendezvous(
            layers[0].pool, [cpu.layer for cpu in layers], tuple(b.numpy() for b in self._boxes),
            self._words[:count], self._words[count : 2 * count], PATIENCE,
        )  # fmt: skip
        self._spent = [0] * count

    def box(self, layer: int) -> Box:
        """The mailbox of the layer of that index."""
        hidden, ids, weights, result = (part[layer] for part in self._boxes)
        return Box(hidden, ids, weights, result, self._ring[layer], self._done[layer])

    def send(
        self,
        layer: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        table: Tensor | None,
        guests: Guests | None = None,
    ) -> None:
        """Rings for a layer, see `kernels.rendezvous.ring`."""
        source = self._source if layer == 0 else None
        parts = (hidden.contiguous(), ids.contiguous(), weights.contiguous())
        ring(*parts, self.box(layer), self.state, table, source, guests)

    def begin(self, tokens: int) -> None:
        """Has the native thread expect a step, which may be given to the device then.

        Raises:
            NativeError: the step before is stuck.
        """
        self._number = self._number % LAST + 1
        self._words[-1, 0] = self._number
        try:
            self._native.begin(self._number, tokens)
        except (RuntimeError, ValueError) as error:
            raise _failure(error) from None
        self._began = time.monotonic()

    def finish(self, seconds: float = SECONDS) -> None:
        """Returns when the CPU has done its part of the step; the device may still be busy.

        Args:
            seconds: a step is given up when none of its layers was answered for so long.

        Raises:
            NativeError: the step has failed, or the device may have given it up; its results are
                worthless, but the next may succeed.
        """
        since, answered = self._began, 0
        while True:
            try:
                over = self._native.wait(min(CHECK, seconds))
            except RuntimeError as error:
                self.give_up()
                raise _failure(error) from None
            now = time.monotonic()
            if now - since > seconds:  # also if this process was stopped for as long
                break
            if over:
                return
            done = int((self._answers == self._number).sum())
            if done > answered:
                since, answered = now, done
        self.give_up()
        raise NativeError(
            f"experts: the CPU did not answer the device within {seconds:.0f} s and the step was "
            "given up; something keeps its threads from running, or memory is being swapped"
        )

    def give_up(self) -> None:
        """Ends the step under way on both sides, however far it is. Only then may the next
        begin: the device must not find that one's number where it looks for its own."""
        self._native.cancel()
        self._answers[:] = self._number + FAILED  # the thread that answers may be stuck
        with suppress(RuntimeError):
            self._native.wait(CHECK)  # it looks up often, but may have lost its processor
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def _answers(self) -> NDArray[np.int32]:
        """The words the device waits for, (layers,)."""
        count = len(self.layers)
        return self._words[count : 2 * count, 0]

    def measure(self, tokens: int) -> None:
        """Tells the meters of layers that have one what the last step cost the CPU."""
        if all(cpu.meter is None for cpu in self.layers):
            return
        for i, (cpu, stats) in enumerate(zip(self.layers, self._native.stats(), strict=True)):
            spent, self._spent[i] = stats["compute_ns"] - self._spent[i], stats["compute_ns"]
            if cpu.meter is not None and spent:
                read = cpu.bytes_of(self._boxes[1][i, :tokens])
                cpu.meter.add(tokens, spent / 1e9, read)


def _failure(error: Exception) -> NativeError:
    return NativeError(f"experts: {str(error).splitlines()[0]}")


class RendezvousCourier:
    """Plain steps wait for the CPU in every layer; recorded ones meet it at a desk.

    Args:
        device: where hidden states come from.

    Attributes:
        records: whether steps can be recorded, as far as is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._plain = WaitingCourier(device)
        self._device = device
        self._desk: Desk | None = None
        self._k = 0  # routes of a token, as seen
        self._recording = self._tried = False
        self._sent: tuple[int, int] | None = None  # layer and tokens
        self.records = True

    @contextmanager
    def recording(self, layers: Sequence[CpuExperts]) -> Iterator[None]:
        """See `Courier.recording`; a plain step must have come before."""
        if layers and (self._desk is None or self._desk.layers != list(layers)):
            self._try(layers[0])
            self._desk = None  # gives its memory back first
            self._desk = Desk(self._device, layers, SHORT_STEP, self._k)
        elif not layers:
            self._desk = None
        self._recording = self._desk is not None
        try:
            yield
        finally:
            self._recording, self._sent = False, None

    @contextmanager
    def answering(self, tokens: int) -> Iterator[None]:
        """See `Courier.answering`."""
        desk = self._desk
        if desk is None:
            yield
            return
        desk.begin(tokens)
        try:
            yield
        except BaseException:
            desk.give_up()
            raise
        desk.finish()
        desk.measure(tokens)

    def _try(self, cpu: CpuExperts) -> None:
        """One trial per courier: two meetings must give what a direct call gives."""
        if self._tried:
            return
        self._tried = True
        problem = trial(self._device, cpu)
        if problem:
            self.records = False
            raise NativeError(f"experts: steps cannot be recorded: {problem}")

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
        self._k = ids.shape[1]
        if not self._recording:
            return self._plain.send(experts, hidden, ids, weights, table, guests)
        assert self._desk is not None
        layer = self._desk.layers.index(experts)
        self._desk.send(layer, hidden, ids, weights, table, guests)
        self._sent = layer, len(hidden)
        return ids

    def abandon(self) -> None:
        """See `Courier.abandon`."""
        self._sent = None
        self._plain.abandon()

    def fetch(self, hits: Tensor | None, shared: Tensor | None) -> Tensor:
        """See `Courier.fetch`."""
        if self._sent is None:
            return self._plain.fetch(hits, shared)
        assert self._desk is not None
        (layer, tokens), self._sent = self._sent, None
        hits, shared = (None if part is None else part.contiguous() for part in (hits, shared))
        return collect(self._desk.box(layer), tokens, self._desk.state, hits, shared)


def trial(device: torch.device, cpu: CpuExperts) -> str:
    """Two round trips of one token through one layer, with other numbers the second time, so that
    stale memory shows; what went wrong, or "".
    """
    desk = Desk(device, [cpu], 1, 1)
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    line = torch.linspace(-1.0, 1.0, cpu.layout.d)[None]

    def meet(hidden: Tensor, ids: Tensor) -> Tensor:
        desk.send(0, hidden.to(device), ids.to(device), weights.to(device), None)
        return collect(desk.box(0), 1, desk.state, limit_ms=TRIAL_MS).cpu()

    meet(line, ids - 1)  # nobody waits yet: kernels are compiled and loaded
    for hidden in (line, -0.5 * line):
        desk.begin(1)
        try:
            found = meet(hidden, ids)
            desk.finish(2 * TRIAL_MS / 1e3)
        except NativeError as error:
            return str(error)
        except BaseException:
            desk.give_up()
            raise
        wanted = cpu(hidden, ids, weights)
        if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):
            return "what one processor writes the other does not see in time"
    return ""


def courier_for(device: torch.device, lazy: bool) -> Courier:
    """The courier of a backend.

    Args:
        device: where hidden states come from.
        lazy: experts are packed when they are first used, by the thread that waits for the device.
    """
    if device.type == "cuda" and not lazy:
        return RendezvousCourier(device)
    if device.type == "cuda":
        log.info("experts stay in the mapped file: steps wait for the host in every layer")
    return WaitingCourier(device)


assert PATIENCE < SECONDS < LIMIT_MS / 1e3
