"""Paged attention in plain torch: grouped-query, causal, sliding window, sinks.

The truth the native and GPU versions are held against. Reads the cache through block tables
and does not know who filled them.
"""

from itertools import pairwise

import torch
from torch import Tensor

from greenroom.layers.batch import Batch, KVCache, KVGroup


def write_kv(cache: KVCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Stores each token's keys and values at its slot.

    Args:
        cache: of one layer; written to.
        slots: (tokens,) int64, block * block_size + offset; a negative one is skipped.
        k: (tokens, kv_heads, key_length) float32.
        v: (tokens, kv_heads, value_length) float32.
    """
    if bool((slots < 0).any()):
        live = slots >= 0
        slots, k, v = slots[live], k[live], v[live]
    size = cache.k.shape[2]
    block, offset = slots // size, slots % size
    cache.k[block, :, offset] = k.to(cache.k.dtype)
    cache.v[block, :, offset] = v.to(cache.v.dtype)


def attention(
    q: Tensor,
    cache: KVCache,
    group: KVGroup,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every query over its sequence's cached keys, its own included.

    Args:
        q: (tokens, heads, key_length) float32, rotated.
        cache: of this layer, the step's keys and values already written.
        group: cache addresses of the layers with this window.
        batch: the step.
        scale: factor of the scores.
        window: keys visible to a query, itself included; None for all.
        sinks: (heads,) float32, a logit per head that joins the softmax without a value.

    Returns:
        (tokens, heads, value_length) float32.
    """
    out = q.new_empty(q.shape[0], q.shape[1], cache.v.shape[3])
    starts = batch.query_starts.tolist()
    for sequence, (begin, end) in enumerate(pairwise(starts)):
        if begin == end:
            continue
        context = int(batch.context_lengths[sequence])
        first = 0 if window is None else max(context - (end - begin) - window + 1, 0)
        keys, values = gather(cache, group.block_tables[sequence], first, context)
        visible = visibility(range(context - (end - begin), context), first, context, window)
        out[begin:end] = attend(q[begin:end], keys, values, visible, scale, sinks)
    return out


def gather(cache: KVCache, table: Tensor, first: int, context: int) -> tuple[Tensor, Tensor]:
    """Keys and values of positions `first` to `context`: (kv_heads, positions, dim) float32."""
    position = torch.arange(first, context)
    size = cache.k.shape[2]
    block, offset = table[position // size].long(), position % size
    keys = cache.k[block, :, offset]  # (positions, kv_heads, key_length)
    values = cache.v[block, :, offset]
    return keys.transpose(0, 1).float(), values.transpose(0, 1).float()


def visibility(queries: range, first: int, context: int, window: int | None) -> Tensor:
    """Which keys of positions `first` to `context` each query sees: (queries, keys) bool."""
    distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(first, context)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Softmax attention of one sequence.

    Args:
        q: (queries, heads, key_length) float32.
        keys, values: (kv_heads, positions, dim) float32; heads / kv_heads query heads
            in a row share one.
        visible: (queries, positions) bool.
        scale: factor of the scores.
        sinks: (heads,) float32 or None.

    Returns:
        (queries, heads, value_length) float32.
    """
    queries, heads, _ = q.shape
    kv_heads = keys.shape[0]
    grouped = q.transpose(0, 1).reshape(kv_heads, -1, q.shape[2])  # (kv_heads, share * queries, k)
    scores = (grouped @ keys.transpose(1, 2) * scale).view(heads, queries, -1)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, queries, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[1]]
    out = weights.reshape(kv_heads, -1, keys.shape[1]) @ values
    return out.view(heads, queries, -1).transpose(0, 1)
