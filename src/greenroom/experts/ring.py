"""Staging memory that a copy stream fills with slabs while the device computes. Knows pages of
experts and when they may be read or filled again; not what is computed from them.
"""

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.cpu import CpuExperts
from greenroom.experts.pinned import driver_upload


@dataclass(slots=True)
class Page:
    """Slabs of some experts of one layer.

    Attributes:
        data: (bytes,) uint8 on the device; slabs lie one after another.
        ready: recorded when the copies into it are done, on the copy stream.
        used: recorded when its last reader is done.
        layer, experts: whose slabs it has, in this order.
    """

    data: Tensor
    ready: Any
    used: Any
    layer: int = -1
    experts: tuple[int, ...] = ()


class Ring:
    """Pages and the stream that fills them; one for all layers.

    Args:
        memory: (pages, bytes) uint8 on the device, at least two pages.
        slabs: most experts of a page.
    """

    def __init__(self, memory: Tensor, slabs: int) -> None:
        self.cuda = memory.is_cuda
        self.slabs = slabs
        self.banks: list[CpuExperts] = []  # of each layer
        self._upload = driver_upload() if self.cuda else None
        event: Any = torch.cuda.Event if self.cuda else lambda: None
        stream: Any = torch.cuda.Stream
        self._stream: Any = stream(memory.device) if self.cuda else None
        self._steps: Any = torch.cuda.current_stream() if self.cuda else None  # that computes
        self._free = deque(Page(row, event(), event()) for row in memory)
        self.staged: deque[Page] = deque()
        self.copied_bytes = 0

    @property
    def room(self) -> bool:
        return bool(self._free)

    def begin(self) -> None:
        """A step begins on the current stream. Copies from now on wait for what the device was
        given before: short steps use the pages as they like."""
        if self.cuda:
            self._steps = torch.cuda.current_stream()  # asked once, as asking is slow
            self._stream.wait_stream(self._steps)

    def fetch(self, layer: int, experts: tuple[int, ...]) -> None:
        """Begins the copies of a page's experts; there must be room."""
        page = self._free.popleft()
        page.layer, page.experts = layer, experts
        if self.cuda:
            self._stream.wait_event(page.used)
        try:
            self.copied_bytes += self._copy(page)
        finally:  # what has begun of copies that fail ends before the page is used again
            self.staged.append(page)
            if self.cuda:
                page.ready.record(self._stream)

    def _copy(self, page: Page) -> int:
        """Begins the copies, by the driver where slabs lie in one piece; returns the bytes."""
        bank, end = self.banks[page.layer], 0
        if self._upload is not None and bank.block is not None:
            here, slab = bank.block.ctypes.data, bank.block.shape[1]
            there, stream = page.data.data_ptr(), self._stream.cuda_stream
            for first, count in _runs(page.experts):
                self._upload(there + end, here + first * slab, count * slab, stream)
                end += count * slab
            return end
        with torch.cuda.stream(self._stream) if self.cuda else nullcontext():
            for expert in page.experts:
                source = torch.from_numpy(bank.slab(expert))
                start, end = end, end + source.numel()
                page.data[start:end].copy_(source, non_blocking=True)
        return end

    def take(self, page: Page) -> None:
        """Makes what is computed from now on wait for the page's copies."""
        if self.cuda:
            page.ready.wait(self._steps)

    def give_back(self, page: Page) -> None:
        """The page's readers have all been given to the device."""
        if self.cuda:
            page.used.record(self._steps)
        self._free.append(page)

    def drop(self, layer: int) -> list[Page]:
        """Frees what is staged of other layers; returns what stays."""
        kept: deque[Page] = deque()
        for page in self.staged:
            if page.layer == layer:
                kept.append(page)
            else:
                self.take(page)  # so that "used" also covers the copies
                self.give_back(page)
        self.staged = kept
        return list(kept)


def _runs(experts: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and number of those that follow each other."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(experts)) if b != a + 1]
    return [(experts[i], j - i) for i, j in pairwise([0, *cuts, len(experts)])]
