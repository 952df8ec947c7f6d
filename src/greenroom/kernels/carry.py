"""Brings a few numbers from pinned memory to the device without a copy command, which would have to
queue behind the weights on their way.
"""

import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel

BLOCK = 1024


@kernel
def _carry(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def carry(source: Tensor, target: Tensor) -> None:
    """Copies from source, in pinned memory or on the device, to target on the device; of one type
    and contiguous."""
    count = source.numel()
    _carry[(-(-count // BLOCK),)](source, target, count, BLOCK=BLOCK)
