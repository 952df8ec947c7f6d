"""Which experts steps chose: short ones are written down by the kernels and fetched between
steps, of long ones each layer tells how often. Knows nothing of slots.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.experts.residency import EMPTY

SEEN = 512  # routes of a layer that a step's log holds


class Account(Protocol):
    """Gives out memory of a device; `layers.ledger.Ledger` is one."""

    device: torch.device

    def empty(self, part: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...

    def release(self, part: str, nbytes: int) -> None: ...


class UseLog:
    """Which experts the last step chose, written by the kernels and read after the step.

    Args:
        account: where memory is booked.
        layers, experts: of the model.
    """

    def __init__(self, account: Account, layers: int, experts: int) -> None:
        self.device = account.empty("slots", [layers, SEEN], torch.int32).fill_(EMPTY)
        self._cuda = account.device.type == "cuda"
        self._host = torch.empty(layers, SEEN, dtype=torch.int32, pin_memory=self._cuda)
        self._uses = np.zeros((layers, experts), np.int64)
        self._reading: tuple[Any, NDArray[np.int64]] | None = None
        self._written: dict[int, int] | None = None  # routes by layer; None if it was replayed
        self._starts = torch.zeros(layers, experts + 1, dtype=torch.int32, pin_memory=self._cuda)
        self._long: dict[int, int] = {}  # experts of layers whose starts are on their way
        event: Any = torch.cuda.Event
        self._arrived = event() if self._cuda else None
        self.k = 0

    def add(self, layer: int, uses: Sequence[int]) -> None:
        """Counts of a long step's layer."""
        self._note(layer, 0)
        self._uses[layer, : len(uses)] += np.asarray(uses, np.int64)

    def later(self, layer: int, starts: Tensor) -> None:
        """The same, on the device: (experts + 1,) int32, where each expert's routes begin."""
        self._note(layer, 0)
        self._long[layer] = len(starts) - 1
        self._starts[layer, : len(starts)].copy_(starts, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def begin(self) -> None:
        """A step begins that is not replayed: its layers tell how much they write."""
        self._written = {}

    def _note(self, layer: int, routes: int) -> None:
        if self._written is not None:
            self._written[layer] = routes

    def row(self, layer: int, ids: Tensor) -> Tensor | None:
        """See `Seen.row`."""
        self.k, fits = ids.shape[1], ids.numel() <= SEEN
        self._note(layer, ids.numel() if fits else 0)
        return self.device[layer] if fits else None

    def read(self, tokens: int) -> None:
        """Begins to fetch what the step just given to the device chose. Where a layer wrote less
        than others or nothing, its line has routes of a step before."""
        written, self._written = self._written, None
        counts = np.full(len(self._uses), tokens * self.k if written is None else 0, np.int64)
        for layer, routes in (written or {}).items():
            counts[layer] = routes
        if not 0 < counts.max() <= SEEN:
            return
        self._host.copy_(self.device, non_blocking=True)
        event: Any = None
        if self._cuda:
            made: Any = torch.cuda.Event
            event = made()
            event.record()
        self._reading = event, counts

    def take(self) -> NDArray[np.int64]:
        """Uses since the last call, (layers, experts); waits for the fetch begun last."""
        if self._long and self._arrived is not None:
            self._arrived.synchronize()
        for row, experts in self._long.items():
            self.add(row, np.diff(self._starts[row, : experts + 1].numpy()).tolist())
        self._long.clear()
        if self._reading is not None:
            (event, counts), self._reading = self._reading, None
            if event is not None:
                event.synchronize()
            ids = self._host[:, : counts.max()].numpy()
            layer, place = np.nonzero((ids >= 0) & (np.arange(counts.max()) < counts[:, None]))
            np.add.at(self._uses, (layer, ids[layer, place]), 1)
        uses, self._uses = self._uses, np.zeros_like(self._uses)
        return uses


class Seen:
    """One layer's line of a `UseLog`."""

    def __init__(self, log: UseLog, layer: int) -> None:
        self.log, self.layer = log, layer

    def later(self, starts: Tensor) -> None:
        """See `UseLog.later`."""
        self.log.later(self.layer, starts)

    def row(self, ids: Tensor) -> Tensor | None:
        """Where a step's ids (tokens, k) go, or None if there are too many."""
        return self.log.row(self.layer, ids)
