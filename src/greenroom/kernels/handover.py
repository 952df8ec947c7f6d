"""Hands one layer's hidden states and routes from the GPU to pinned memory, in one launch.

The processors share that memory's addresses, so no copy command is needed. Knows nothing of who
reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _publish(
    hidden,
    ids,
    weights,
    to_hidden,
    to_ids,
    to_weights,
    values,
    routes,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_hidden + at, tl.load(hidden + at, mask=at < values), mask=at < values)
    tl.store(to_ids + at, tl.load(ids + at, mask=at < routes), mask=at < routes)
    tl.store(to_weights + at, tl.load(weights + at, mask=at < routes), mask=at < routes)


def publish(
    hidden: Tensor, ids: Tensor, weights: Tensor, to: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Copies hidden, ids and weights to where the CPU reads them.

    Args:
        hidden: (tokens, d) float32, contiguous.
        ids: (tokens, k) int32, contiguous.
        weights: (tokens, k) float32, contiguous.
        to: the same shapes and types in pinned memory.
    """
    values, routes = hidden.numel(), ids.numel()
    _publish[(-(-max(values, routes) // BLOCK),)](
        hidden, ids, weights, *to, values, routes, BLOCK=BLOCK
    )


def publish_twin(
    hidden: Tensor, ids: Tensor, weights: Tensor, to: tuple[Tensor, Tensor, Tensor]
) -> None:
    """`publish` in plain torch; the truth it is held against."""
    for source, target in zip((hidden, ids, weights), to, strict=True):
        target.copy_(source)
    if hidden.is_cuda:
        torch.cuda.current_stream().synchronize()
