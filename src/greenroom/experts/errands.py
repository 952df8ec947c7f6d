"""Routes of a long step that the CPU computes while the device goes on: rows go to pinned memory, a
native thread has them computed, and the device waits for its answer where the sum needs it. The
host launches and leaves. Knows nothing of who chose the experts.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom import native
from greenroom.errors import NativeError
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.rendezvous import FAILED, LAST, PATIENCE, SECONDS, WORDS
from greenroom.kernels.errand import meet, send, tell

LEAST_ROWS = 1024  # of the pinned memory


@dataclass(frozen=True, slots=True)
class _Errand:
    """What is under way."""

    layer: int
    rows: int
    nbytes: int  # of the experts
    before: int  # nanoseconds the layer had cost


class Errands:
    """What all layers share: pinned memory, two bells and the thread behind them.

    Args:
        device: whose steps are served; on "cpu" the memory is not pinned.
        layers: that may be asked, of one width.
    """

    def __init__(self, device: torch.device, layers: Sequence[CpuExperts]) -> None:
        self._device, self._layers = device, list(layers)
        self._number = self._room = 0
        self._native: Any = None  # made when there is something to do, with the memory
        self._hidden = self._result = torch.empty(0)
        self._under_way: _Errand | None = None

    def go(
        self, layer: int, hidden: Tensor, tokens: Tensor, starts: NDArray[np.int32], lent: list[int]
    ) -> Tensor:
        """Has the CPU begin; the device must have met the errand before.

        Args:
            layer: index of the layer.
            hidden: (tokens, d) float32 on the device, contiguous.
            tokens, starts: as of `Routes`; starts on the host.
            lent: experts, all of whose routes are computed.

        Returns:
            (rows, d) float32, pinned: the routes' unweighted results, expert after expert, for
            what the device is given after `meet`.

        Raises:
            NativeError: the errand before has failed.
        """
        self.settle()
        counts = starts[1:][lent] - starts[lent]
        ends = counts.cumsum()
        rows = int(ends[-1])
        if rows > self._room:
            self._reserve(max(LEAST_ROWS, rows + rows // 2), hidden.shape[1])
        skipped = starts[lent] - (ends - counts)  # of the routes before each expert's
        self._lines[:rows] = np.arange(rows) + np.repeat(skipped, counts)
        self._ids[0, :rows, 0] = np.repeat(lent, counts)
        self._number = self._number % LAST + 1
        cpu = self._layers[layer]
        nbytes = sum(cpu.slab(expert).nbytes for expert in lent)  # packs what is not yet
        self._under_way = _Errand(layer, rows, nbytes, self._spent(layer))
        send(hidden, tokens, self._sources[:rows], self._hidden[:rows])
        tell(self._ring, self._number)
        try:  # behind the launches: threads wake while the device sends
            self._native.begin(self._number, rows, layer)
        except RuntimeError as error:
            raise _failure(error) from None
        return self._result[:rows]

    def meet(self) -> None:
        """Has the device wait for the answer."""
        meet(self._done, self._number)

    def settle(self) -> None:
        """Returns when the CPU has done what it was asked for.

        Raises:
            NativeError: it has failed; results of the step are worthless.
        """
        if (errand := self._under_way) is None:
            return
        try:
            over = self._native.wait(SECONDS)
        except RuntimeError as error:
            self.abandon()
            raise _failure(error) from None
        if not over:
            self.abandon()
            raise NativeError(f"experts: the CPU did not finish a layer within {SECONDS:.0f} s")
        self._under_way, meter = None, self._layers[errand.layer].meter
        if meter is not None:
            spent = self._spent(errand.layer) - errand.before
            meter.add(errand.rows, spent / 1e9, errand.nbytes)

    def abandon(self) -> None:
        """Ends what is under way on both sides, after a step failed."""
        if self._under_way is None:
            return
        self._under_way = None
        self._native.cancel()
        self._words[1, 0] = self._number + FAILED  # the thread that answers may be stuck
        with suppress(RuntimeError):
            self._native.wait(SECONDS)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _spent(self, layer: int) -> int:
        """Nanoseconds a layer has cost the CPU; only told where somebody asks."""
        if self._layers[layer].meter is None:
            return 0
        return int(self._native.stats()[layer]["compute_ns"])

    def _reserve(self, rows: int, d: int) -> None:
        """Pinned memory for so many rows; nothing is under way."""
        pin = self._device.type == "cuda"
        if pin:  # the device may still read the old
            torch.cuda.synchronize(self._device)
        self._native, self._room = None, 0  # as long as there is none
        self._hidden, self._result = torch.zeros(2, rows, d, pin_memory=pin)
        self._sources = torch.zeros(rows, dtype=torch.int32, pin_memory=pin)
        self._ring, self._done = bells = torch.zeros(2, WORDS, dtype=torch.int32, pin_memory=pin)
        self._lines, self._words = self._sources.numpy(), bells.numpy()
        self._ids = np.zeros((1, rows, 1), np.int32)
        boxes = (
            self._hidden.numpy()[None], self._ids, np.ones((1, rows, 1), np.float32),
            self._result.numpy()[None],
        )  # fmt: skip
        self._native = native.lib().Rendezvous(
            self._layers[0].pool, [cpu.layer for cpu in self._layers], boxes, self._words[:1],
            self._words[1:], PATIENCE,
        )  # fmt: skip
        self._room = rows


def _failure(error: Exception) -> NativeError:
    return NativeError(f"experts: {str(error).splitlines()[0]}")
