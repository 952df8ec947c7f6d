"""Hands one layer's hidden states and routes from the GPU to pinned memory, in one launch.

The processors share that memory's addresses, so no copy command is needed. Knows nothing of who
reads it.
"""

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel

BLOCK = 1024


@kernel
def _publish(
    hidden,
    ids,
    weights,
    table,
    to_hidden,
    to_ids,
    to_weights,
    values,
    routes,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_hidden + at, tl.load(hidden + at, mask=at < values), mask=at < values)
    expert = tl.load(ids + at, mask=at < routes, other=-1)
    if TABLE:
        slot = tl.load(table + expert, mask=expert >= 0, other=-1)
        expert = tl.where(slot >= 0, -1, expert)
    tl.store(to_ids + at, expert, mask=at < routes)
    tl.store(to_weights + at, tl.load(weights + at, mask=at < routes), mask=at < routes)


def publish(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    to: tuple[Tensor, Tensor, Tensor],
    table: Tensor | None = None,
) -> None:
    """Copies hidden, ids and weights to where the CPU reads them.

    Args:
        hidden: (tokens, d) float32, contiguous.
        ids: (tokens, k) int32, contiguous.
        weights: (tokens, k) float32, contiguous.
        to: the same shapes and types in pinned memory.
        table: (experts,) int32; ids of experts whose entry is not -1 arrive as -1.
    """
    values, routes = hidden.numel(), ids.numel()
    _publish[(-(-max(values, routes) // BLOCK),)](
        hidden, ids, weights, ids if table is None else table, *to, values, routes,
        TABLE=table is not None, BLOCK=BLOCK,
    )  # fmt: skip


def publish_twin(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    to: tuple[Tensor, Tensor, Tensor],
    table: Tensor | None = None,
) -> None:
    """`publish` in plain torch; the truth it is held against."""
    if table is not None:
        here = (ids >= 0) & (table[ids.clamp(min=0).long()] >= 0)
        ids = ids.masked_fill(here, -1)
    for source, target in zip((hidden, ids, weights), to, strict=True):
        target.copy_(source)
    if hidden.is_cuda:
        torch.cuda.current_stream().synchronize()
