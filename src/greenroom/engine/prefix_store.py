"""Keeps the content of cache blocks that lost their place, in RAM and within a budget, so that
a prefix met again is copied back instead of computed. The same for a cache in RAM and one in
VRAM. Knows tensors; which blocks matter, and for whom, is the block cache's business.
"""

from collections import OrderedDict
from collections.abc import Sequence as Items
from contextlib import suppress

import torch
from torch import Tensor

Key = tuple[int, bytes]  # KV group, digest of all tokens up to the end of the block


class PrefixStore:
    """Block contents by what they stand for; the least recently used go first.

    Args:
        budget: most bytes to hold.
        groups: for each KV group, the keys and values of all its layers; a tensor's first
            dimension counts blocks.
    """

    def __init__(self, budget: int, groups: Items[Items[Tensor]]) -> None:
        self.budget = budget
        self.bytes = 0
        self.kept = 0  # blocks taken in since the start
        self.restored = 0  # blocks copied back since the start
        self._groups = [tuple(tensors) for tensors in groups]
        self._contents: OrderedDict[Key, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._contents)

    def __contains__(self, key: Key) -> bool:
        return key in self._contents

    @torch.inference_mode()
    def keep(self, key: Key, block: int) -> None:
        """Takes in what a block of the key's group holds, before it is overwritten."""
        if key in self._contents:
            self._contents.move_to_end(key)
            return
        tensors = self._groups[key[0]]
        size = sum(tensor[block].nbytes for tensor in tensors)
        if size > self.budget or not size:
            return
        while self.bytes + size > self.budget:
            _, oldest = self._contents.popitem(last=False)
            self.bytes -= oldest.nbytes
        # One copy to RAM for all layers: a GPU pays for each copy, not for its size.
        parts = [tensor[block].reshape(-1).view(torch.uint8) for tensor in tensors]
        if any(part.device != parts[0].device for part in parts):  # layers on both processors
            parts = [part.cpu() for part in parts]
        try:
            self._contents[key] = torch.cat(parts).cpu()
        except torch.OutOfMemoryError:
            self._contents[key] = torch.cat([part.cpu() for part in parts])
        self.bytes += size
        self.kept += 1

    def take(self, key: Key) -> Tensor:
        """(bytes,) uint8: the content of a key that is here; it stays, as the newest."""
        self._contents.move_to_end(key)
        return self._contents[key]

    @torch.inference_mode()
    def restore(self, key: Key, block: int, content: Tensor) -> None:
        """Writes a content from `take` into a block of the key's group."""
        tensors = self._groups[key[0]]
        with suppress(torch.OutOfMemoryError):  # then part by part
            content = content.to(tensors[0].device)
        at = 0
        for tensor in tensors:
            target = tensor[block]
            part = content[at : at + target.nbytes].view(target.dtype)
            target.copy_(part.view(target.shape))
            at += target.nbytes
        self.restored += 1
