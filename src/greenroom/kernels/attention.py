"""Paged attention on the GPU: grouped-query, causal, sliding window, sinks.

One kernel serves prefill and decode: a program owns a tile of query rows (queries x the query
heads that share one key-value head) and walks the key blocks that tile can see; a long context
is split over several programs and merged. Knows block tables, not who filled them.
"""

from itertools import pairwise

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two

ROWS = 16  # query rows of a decode tile: the least a tensor-core product takes
PREFILL_ROWS = 64
COLUMNS = 64  # keys read at a time


@kernel
def _attend(
    q,
    k,
    v,
    out,
    peaks,
    sums,
    sinks,
    tables,
    query_starts,
    contexts,
    tile_sequences,
    tile_firsts,
    scale,
    q_stride,
    table_stride,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PER_TILE: tl.constexpr = ROWS // GROUP
    sequence = tl.load(tile_sequences + tile)
    first = tl.load(tile_firsts + tile)
    end = tl.load(query_starts + sequence + 1)
    context = tl.load(contexts + sequence)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (row < PER_TILE * GROUP) & (token < end)
    position = context - end + token  # of each row's query
    low = context - end + first
    high = context - end + tl.minimum(first + PER_TILE, end)  # one past the last query
    start = 0
    if WINDOW > 0:
        start = tl.maximum(low - WINDOW + 1, 0) // COLS * COLS
    chunks = tl.maximum(tl.cdiv(high - start, COLS), 0)
    per_split = tl.cdiv(chunks, SPLITS)
    chunk_end = tl.minimum((split + 1) * per_split, chunks)

    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    query = tl.load(
        q + token[:, None].to(tl.int64) * q_stride + head[:, None] * KEY + key_dim[None, :],
        mask=live[:, None] & (key_dim < KEY)[None, :],
        other=0.0,
    ).to(k.dtype.element_ty)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)

    for chunk in range(split * per_split, chunk_end):
        column = start + chunk * COLS + tl.arange(0, COLS)
        seen = column < high
        block = tl.load(tables + sequence * table_stride + column // BLOCK, mask=seen, other=0).to(
            tl.int64
        )
        seen = seen & (block >= 0)
        line = (tl.maximum(block, 0) * KV_HEADS + kv_head) * BLOCK + column % BLOCK
        keys = tl.load(
            k + line[None, :] * KEY + key_dim[:, None],
            mask=seen[None, :] & (key_dim < KEY)[:, None],
            other=0.0,
        )
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        visible = seen[None, :] & (column[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (position[:, None] - column[None, :] < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(peak - safe)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(
            v + line[:, None] * VALUE + value_dim[None, :],
            mask=seen[:, None] & (value_dim < VALUE)[None, :],
            other=0.0,
        )
        part = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        acc = acc * fade[:, None] + part
        peak = new_peak

    lane = (split * tokens + token) * HEADS + head
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=live, other=0.0)
            top = tl.maximum(peak, sink)
            fade = tl.exp(peak - top)
            total = total * fade + tl.exp(sink - top)
            acc = acc * fade[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        tl.store(peaks + lane, peak, mask=live)
        tl.store(sums + lane, total, mask=live)
    tl.store(
        out + lane[:, None] * VALUE + value_dim[None, :],
        acc,
        mask=live[:, None] & (value_dim < VALUE)[None, :],
    )


@kernel
def _merge(
    parts,
    peaks,
    sums,
    sinks,
    out,
    lanes,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    lane = tl.program_id(0)  # token * HEADS + head
    dim = tl.arange(0, VALUE_PAD)
    top = tl.full((), float("-inf"), tl.float32)
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(peaks + split * lanes + lane))
    total = tl.full((), 0.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + lane % HEADS)
        top = tl.maximum(top, sink)
        total += tl.exp(sink - top)
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros((VALUE_PAD,), tl.float32)
    for split in range(SPLITS):
        at = split * lanes + lane
        fade = tl.exp(tl.load(peaks + at) - top)
        total += tl.load(sums + at) * fade
        acc += tl.load(parts + at.to(tl.int64) * VALUE + dim, mask=dim < VALUE, other=0.0) * fade
    tl.store(
        out + lane.to(tl.int64) * VALUE + dim,
        acc / tl.where(total == 0.0, 1.0, total),
        mask=dim < VALUE,
    )


def tiles(query_starts: list[int], group: int, rows: int) -> tuple[list[int], list[int]]:
    """Cuts each sequence's queries into tiles of `rows // group`: (sequences, first rows)."""
    sequences, firsts = [], []
    per_tile = rows // group
    for sequence, (begin, end) in enumerate(pairwise(query_starts)):
        for first in range(begin, end, per_tile):
            sequences.append(sequence)
            firsts.append(first)
    return sequences, firsts


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    tile_sequences: Tensor,
    tile_firsts: Tensor,
    *,
    scale: float,
    rows: int = ROWS,
    splits: int = 1,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every query row over its sequence's cached keys.

    Args:
        q: (tokens, heads, key_length) float32, already rotated; its keys are in the cache. Heads
            and channels of a token contiguous.
        k_cache, v_cache: (blocks, kv_heads, block_size, dim) float16, bfloat16 or float32.
        tables: (sequences, blocks) int32; -1 where the window has moved past.
        query_starts: (sequences + 1,) int32.
        contexts: (sequences,) int32, positions in the cache after this step; 0 pads a batch.
        tile_sequences, tile_firsts: (tiles,) int32 from `tiles` with the same `rows`.
        scale: factor of the scores.
        rows: query rows per tile, a power of two >= 16 and >= heads / kv_heads.
        splits: programs a sequence's keys are spread over.
        window: keys visible to a query, itself included; None for all.
        sinks: (heads,) float32, a logit per head that joins the softmax without a value.

    Returns:
        (tokens, heads, value_length) float32.
    """
    tokens, heads, key = q.shape
    kv_heads, block, value = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    out = torch.empty(tokens, heads, value, device=q.device, dtype=torch.float32)
    parts, stats = out, out
    if splits > 1:
        parts = torch.empty(splits, tokens, heads, value, device=q.device, dtype=torch.float32)
        stats = torch.empty(2, splits, tokens, heads, device=q.device, dtype=torch.float32)
    value_pad = max(16, power_of_two(value))
    shape = {"HEADS": heads, "VALUE": value, "VALUE_PAD": value_pad, "SPLITS": splits}
    _attend[(tile_sequences.shape[0], kv_heads, splits)](
        q, k_cache, v_cache, parts, stats[0], stats[-1], q if sinks is None else sinks,
        tables, query_starts, contexts, tile_sequences, tile_firsts, scale, q.stride(0),
        tables.stride(0), tokens, KV_HEADS=kv_heads, KEY=key,
        KEY_PAD=max(16, power_of_two(key)), BLOCK=block, WINDOW=window or 0,
        SINKS=sinks is not None, ROWS=rows, COLS=COLUMNS, **shape,
    )  # fmt: skip
    if splits > 1:
        _merge[(tokens * heads,)](
            parts, stats[0], stats[1], q if sinks is None else sinks, out, tokens * heads,
            SINKS=sinks is not None, **shape,
        )  # fmt: skip
    return out


def attend_twin(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend` in plain torch, one sequence after another; the truth it is held against."""
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    block = k_cache.shape[2]
    outputs = []
    for sequence, context in enumerate(contexts.tolist()):
        begin, end = int(query_starts[sequence]), int(query_starts[sequence + 1])
        column = torch.arange(context, device=q.device)
        ids = tables[sequence, column // block].long().clamp(min=0)
        keys = k_cache[ids, :, column % block].float()  # (context, kv_heads, key)
        values = v_cache[ids, :, column % block].float()
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        scores = torch.einsum("thd,chd->htc", q[begin:end].float(), keys) * scale
        position = torch.arange(context - (end - begin), context, device=q.device)[:, None]
        hidden = column > position
        if window is not None:
            hidden |= position - column >= window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, extra], -1)
        weights = torch.softmax(scores, -1)[..., :context]
        outputs.append(torch.einsum("htc,chd->thd", weights, values))
    return torch.cat(outputs)
