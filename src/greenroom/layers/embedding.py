"""The token embedding: rows are gathered from the file's own blocks and only they are decoded.

Knows token ids and blocks, not what a token is.
"""

from typing import Any

import torch
from torch import Tensor

from greenroom.experts.slabs import copied
from greenroom.gguf import GGMLType, dequantize
from greenroom.layers.weight import Weight

# Types torch can gather and widen by itself.
_DIRECT = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


class Embedding:
    """A table of (vocabulary, width) values in any block format.

    Args:
        weight: (vocabulary, width).
        pool: native threads that copy the bytes into memory of our own; None leaves them in the
            mapped file.
    """

    def __init__(self, weight: Weight, pool: Any = None) -> None:
        self.type = weight.type
        self.vocabulary, self.width = weight.shape
        self.raw = weight.raw if pool is None else copied(pool, weight.raw)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.raw.nbytes

    @property
    def reads(self) -> bool:
        """Whether `gather` works: the device looks rows up by itself."""
        return False

    def gather(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """Looks rows up without the host; part of a recorded step.

        Args:
            ids: (n,) int64 on the device; negative ones are found in `chosen`.
            chosen: (n,) int64 on the device.

        Returns:
            (n, width) float32 on the device.
        """
        raise NotImplementedError

    def __call__(self, tokens: Tensor) -> Tensor:
        """Looks up (tokens,) int64 ids below the vocabulary's size: (tokens, width) float32."""
        return self.rows(tokens)

    def rows(self, tokens: Tensor) -> Tensor:
        """The same, in RAM wherever the model computes."""
        rows = self.raw[tokens.numpy()]  # (tokens, row_bytes), a copy
        direct = _DIRECT.get(self.type)
        if direct is not None:
            return torch.from_numpy(rows).view(direct).float()
        return torch.from_numpy(dequantize(self.type, rows))
