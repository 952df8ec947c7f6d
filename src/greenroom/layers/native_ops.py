"""The native operations of attention layers and routers: torch tensors in and out, no copies.

Each function checks its arguments natively and raises ValueError (a shape, type or index is
wrong) or TypeError (not a CPU tensor). A call costs one to two microseconds beyond its work.
Knows nothing of models; the plain torch twins are the other modules of this package.
"""

from typing import Any

import torch
from torch import Tensor

from greenroom import native
from greenroom.errors import NativeError

Pool = Any  # native.lib().Pool; its type exists only at run time
RouterRule = Any  # native.lib().RouterRule

_lib = native.lib()


def new_pool(threads: int | None = None) -> Pool:
    """A thread pool; by default with as many threads as `native.lib().default_threads()` says.

    Raises:
        NativeError: the system starts no more threads.
    """
    wanted = _lib.default_threads()["threads"] if threads is None else threads
    try:
        return _lib.Pool(wanted)
    except RuntimeError as error:
        raise NativeError(f"{wanted} threads cannot be started ({error}); ask for fewer") from None


def rms_norm(
    pool: Pool,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: (tokens, width) or (tokens, heads, width) float32; only the last dimension must be
            contiguous, so slices of a fused projection and per-head norms need no copy.
        weight: (width,) float32.
        residual: of x's shape; if given, `x += residual` first, in place.
        out: of x's shape, may be x itself; by default a new tensor.
    """
    out = torch.empty_like(x) if out is None else out
    _lib.rms_norm(pool, x, weight, eps, out, residual)
    return out


def layer_norm(
    pool: Pool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm over the last dimension; arguments as those of `rms_norm`, bias (width,)."""
    out = torch.empty_like(x) if out is None else out
    _lib.layer_norm(pool, x, weight, bias, eps, out, residual)
    return out


def rope_table(pool: Pool, positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> Tensor:
    """Cosines and sines of one step, for `rope`; layers with the same frequencies share it.

    Args:
        positions: (tokens,) int64.
        inv_freq: (n_rot / 2,) float32, radians per position.
        magnitude: multiplies both.

    Returns:
        (tokens, 2, n_rot / 2) float32; angles are formed in float64.
    """
    out = torch.empty((positions.shape[0], 2, inv_freq.shape[0]))
    _lib.rope_table(pool, positions, inv_freq, magnitude, out)
    return out


def rope(pool: Pool, x: Tensor, table: Tensor, style: str) -> Tensor:
    """Rotates x (tokens, heads, head_dim) float32 in place and returns it.

    The first n_rot elements of a head are rotated, the rest passes through. `style` "neox"
    pairs element i with i + n_rot / 2, "norm" pairs 2i with 2i + 1.
    """
    _lib.rope(pool, x, table, style)
    return x


def write_kv(
    pool: Pool, k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """Stores keys and values (tokens, kv_heads, width) float32 in the caches.

    Args:
        slots: (tokens,) int64, block * block_size + offset.
        k_cache, v_cache: (blocks, kv_heads, block_size, width) float32 or float16.
    """
    _lib.write_kv(pool, k, v, slots, k_cache, v_cache)


def attention(
    pool: Pool,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a batch of sequences over their paged keys and values.

    Query i of sequence s has position `context_lengths[s] - queries of s + i`. The result for a
    token does not depend, to the bit, on the rest of the batch, on threads or on chunking.

    Args:
        q: (tokens, heads, key_width) float32; query head h reads kv head h // (heads / kv_heads).
        k_cache: (blocks, kv_heads, block_size, key_width) float32 or float16.
        v_cache: (blocks, kv_heads, block_size, value_width), same type.
        block_tables: (sequences, blocks) int32; entries no query looks at may be anything.
        query_starts: (sequences + 1,) int32, from 0 to tokens.
        context_lengths: (sequences,) int32, positions in the cache, this step's included.
        window: a query sees that many keys, itself included; None: all before it.
        sinks: (heads,) float32 logits that join each head's softmax.

    Returns:
        (tokens, heads, value_width) float32.
    """
    if out is None:
        out = torch.empty((q.shape[0], q.shape[1], v_cache.shape[3]))
    step = (block_tables, query_starts, context_lengths)
    _lib.attention(pool, q, k_cache, v_cache, *step, scale, window, sinks, out)
    return out


def router_rule(
    gating: str,
    selected: int,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    groups_used: int = 1,
    jitter: float = 0.01,
) -> RouterRule:
    """How a router turns logits into experts and weights; made once per layer.

    Args:
        gating: "softmax" over all experts, "softmax_selected" over the chosen ones, "sigmoid",
            or "sparse_mixer" (two experts, weights not normalised; Phi-3.5-MoE, GRIN).
        selected: experts per token.
        renormalize: the weights of a token add up to 1 before the scale.
        groups, groups_used: only experts of the best groups take part, by the sum of the two
            best scores of each.
        jitter: sparse_mixer only; logits within 2 * jitter of the best, relatively, are tied.
    """
    return _lib.RouterRule(gating, selected, renormalize, scale, groups, groups_used, jitter)


def router(
    pool: Pool,
    x: Tensor,
    weight: Tensor,
    rule: RouterRule,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first; ties go to the lower id.

    Args:
        x: (tokens, width) float32.
        weight: (experts, width) float32, and `bias` (experts,): the router's linear layer.
        selection_bias: (experts,) float32, added to the scores for the choice only.

    Returns:
        ids (tokens, selected) int32 and weights (tokens, selected) float32.
    """
    ids = torch.empty((x.shape[0], rule.selected), dtype=torch.int32)
    weights = torch.empty((x.shape[0], rule.selected))
    _lib.router(pool, x, weight, bias, selection_bias, rule, ids, weights)
    return ids, weights
