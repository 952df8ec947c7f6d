"""The token embedding of a model whose layers are on a GPU: the table stays in RAM, where the
device reads rows by itself if it can. Knows token ids and blocks, not what a token is.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from greenroom.experts.pinned import register
from greenroom.kernels.gather import KINDS, gather
from greenroom.layers.device_parts import to_device
from greenroom.layers.embedding import Embedding
from greenroom.layers.weight import Weight

log = logging.getLogger(__name__)


class DeviceEmbedding(Embedding):
    """The table stays in RAM; the rows of a step are read by the device or copied to it.

    Args:
        weight: (vocabulary, width).
        device: where the rows go.
        pool: native threads that copy the bytes into memory of our own; None leaves them in the
            mapped file.
    """

    def __init__(self, weight: Weight, device: torch.device, pool: Any) -> None:
        super().__init__(weight, pool)
        self._device = device
        self._table = self._reachable() if pool is not None and int(self.type) in KINDS else None

    def _reachable(self) -> Tensor | None:
        """The table as the device sees it, (vocabulary, row bytes) uint8; None if it cannot."""
        if self._device.type == "cuda" and (error := register(self.raw, self)):
            log.info("embedding rows are looked up by the host: CUDA error %d", error)
            return None
        return torch.from_numpy(self.raw)

    @property
    def reads(self) -> bool:
        """See `Embedding.reads`."""
        return self._table is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Looks up (tokens,) int64 ids in RAM: (tokens, width) float32 on the device."""
        if self._table is None:
            return to_device(self.rows(tokens), self._device)
        ids = to_device(tokens, self._device)
        return self.gather(ids, ids)

    def gather(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """See `Embedding.gather`."""
        assert self._table is not None
        out = torch.empty(len(ids), self.width, device=self._device)
        return gather(self._table, int(self.type), ids, chosen, out)
