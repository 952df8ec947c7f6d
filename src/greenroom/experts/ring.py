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
        self._blocks: dict[int, Tensor] = {}  # the same where slabs lie in one piece, as tensors
        event: Any = torch.cuda.Event if self.cuda else lambda: None
        stream: Any = torch.cuda.Stream
        self._stream: Any = stream(memory.device) if self.cuda else None
        self._free = deque(Page(row, event(), event()) for row in memory)
        self.staged: deque[Page] = deque()
        self.copied_bytes = 0

    @property
    def room(self) -> bool:
        return bool(self._free)

    def wait(self) -> None:
        """Copies from now on wait for what the device was given before: short steps use the pages
        as they like."""
        if self.cuda:
            self._stream.wait_stream(torch.cuda.current_stream())

    def fetch(self, layer: int, experts: tuple[int, ...]) -> None:
        """Begins the copies of a page's experts; there must be room."""
        page = self._free.popleft()
        page.layer, page.experts = layer, experts
        end = 0
        if self.cuda:
            self._stream.wait_event(page.used)
        with torch.cuda.stream(self._stream) if self.cuda else nullcontext():
            for source in self._sources(layer, experts):
                start, end = end, end + source.numel()
                page.data[start:end].copy_(source, non_blocking=True)
            if self.cuda:
                page.ready.record(self._stream)
        self.staged.append(page)
        self.copied_bytes += end

    def take(self, page: Page) -> None:
        """Makes what is computed from now on wait for the page's copies."""
        if self.cuda:
            page.ready.wait()

    def give_back(self, page: Page) -> None:
        """The page's readers have all been given to the device."""
        if self.cuda:
            page.used.record()
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

    def _sources(self, layer: int, experts: tuple[int, ...]) -> list[Tensor]:
        """The experts' bytes in as few pieces as they lie in."""
        bank = self.banks[layer]
        if bank.block is None:
            return [torch.from_numpy(bank.slab(expert)) for expert in experts]
        if layer not in self._blocks:
            self._blocks[layer] = torch.from_numpy(bank.block)
        block = self._blocks[layer]
        cuts = [i + 1 for i, (a, b) in enumerate(pairwise(experts)) if b != a + 1]
        runs = pairwise([0, *cuts, len(experts)])
        return [block[experts[i] : experts[j - 1] + 1].view(-1) for i, j in runs]
