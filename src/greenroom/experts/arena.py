"""VRAM slots of one size, for the layers whose slabs have one layout: their memory, who sits where,
and the copies that fill them. When a copy has arrived is for others to know.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.residency import EMPTY, Move, Residency
from greenroom.experts.slabs import SlabLayout
from greenroom.experts.uselog import SEEN, Account


class Arena:
    """The slots of all layers with one layout.

    Args:
        account: where the memory is booked.
        layers: indices of the layers among all.
        banks: the slabs of each.
        count: slots.
    """

    def __init__(
        self, account: Account, layers: list[int], banks: list[CpuExperts], count: int
    ) -> None:
        self.layers, self.banks = layers, banks
        self._account = account
        self.slab = banks[0].layout.nbytes  # bytes of a slot
        self.memory = account.empty("slots", [count, self.slab], torch.uint8)
        self.residency = Residency(len(layers), banks[0].experts, count)

    def shrink(self) -> int:
        """Gives half of the slots back, but not the last; returns the bytes.

        The rest is allocated anew and filled again: part of a tensor cannot be freed.
        """
        count, slab = self.memory.shape
        if count < 2:
            return 0
        kept, device = count // 2, self._account.device
        self.memory = torch.empty(0, slab, dtype=torch.uint8, device=device)
        self._account.release("slots", count * slab)
        torch.cuda.empty_cache()  # nothing happens where CUDA is not in use
        try:
            self.memory = self._account.empty("slots", [kept, slab], torch.uint8)
        except torch.OutOfMemoryError:  # somebody was faster
            self._account.release("slots", kept * slab)
            kept = 0
        self.residency.shrink(kept)
        for move in self.residency.held:
            self.copy(move)
        return int((count - kept) * slab)

    def missed(self, uses: NDArray[np.int64]) -> int:
        """Bytes of the experts without a slot that were used; uses: (layers of all, experts)."""
        used = uses[self.layers, : self.banks[0].experts] > 0
        return self.slab * int((used & (self.residency.slot_of == EMPTY)).sum())

    def copy(self, move: Move) -> int:
        """Begins the copy of one slab; returns its bytes."""
        source = torch.from_numpy(self.banks[move.layer].slab(move.expert))
        self.memory[move.slot].copy_(source, non_blocking=True)
        return source.numel()


def arenas(account: Account, banks: Sequence[CpuExperts], nbytes: int) -> list[Arena]:
    """One per layout of slabs; each gets the share of the memory that its experts have of all."""
    groups: dict[tuple[SlabLayout, int, str], list[int]] = {}
    for i, bank in enumerate(banks):
        groups.setdefault((bank.layout, bank.experts, bank.activation), []).append(i)
    total = sum(bank.layout.nbytes * bank.experts for bank in banks)
    if nbytes < total:  # what is beside the slots comes out of the same bytes
        nbytes = max(0, nbytes - 4 * len(banks) * (SEEN + max(bank.experts for bank in banks)))
    arenas = []
    for (layout, experts, _), layers in groups.items():
        own = layout.nbytes * experts * len(layers)
        count = min(nbytes * own // total // layout.nbytes, experts * len(layers))
        if count > 0:
            arenas.append(Arena(account, layers, [banks[i] for i in layers], count))
    return arenas
