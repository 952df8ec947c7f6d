"""Rotary embedding on the GPU, in one launch with RMSNorm of heads before it and with writing keys
and values into the paged cache.

Knows angles as a table of inverse frequencies; how they were scaled (YaRN, longrope) is decided
in `layers.rope`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two
from greenroom.kernels.norm import norm_twin


@triton.jit
def _turn(
    source, target, weight, spread, position, frequencies, magnitude, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, NEOX: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Rotates the first 2 * HALF channels of one head from `source` to `target`; each thread
    writes the pairs it has read, so both may be the same memory."""
    pair = tl.arange(0, HALF_PAD)
    inside = pair < HALF
    frequency = tl.load(frequencies + pair, mask=inside, other=0.0)
    # float64 angles: at position 100,000 float32 would lose three digits of the phase.
    turns = position.to(tl.float64) * frequency.to(tl.float64) * 0.15915494309189535
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    cosine, sine = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    if NEOX:
        low, high = pair, pair + HALF
    else:
        low, high = 2 * pair, 2 * pair + 1
    a = tl.load(source + low, mask=inside, other=0.0)
    b = tl.load(source + high, mask=inside, other=0.0)
    if NORMED:
        a *= spread * tl.load(weight + low, mask=inside, other=0.0)
        b *= spread * tl.load(weight + high, mask=inside, other=0.0)
    tl.store(target + low, a * cosine - b * sine, mask=inside)
    tl.store(target + high, a * sine + b * cosine, mask=inside)


@triton.jit
def _head(
    source, target, weight, eps, position, frequencies, magnitude, KEY: tl.constexpr,
    KEY_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, NEOX: tl.constexpr,
    NORMED: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """One head, normalised and rotated, from `source` to `target`."""
    dim = tl.arange(0, KEY_PAD)
    spread = 1.0
    if NORMED:
        value = tl.load(source + dim, mask=dim < KEY, other=0.0)
        spread = tl.rsqrt(tl.sum(value * value, 0) / KEY + eps)
    if HALF > 0:
        _turn(
            source, target, weight, spread, position, frequencies, magnitude, HALF, HALF_PAD,
            NEOX, NORMED,
        )  # fmt: skip
    if KEY > 2 * HALF and (NORMED or MOVED):
        rest = (dim >= 2 * HALF) & (dim < KEY)
        value = tl.load(source + dim, mask=rest, other=0.0)
        if NORMED:
            value *= spread * tl.load(weight + dim, mask=rest, other=0.0)
        tl.store(target + dim, value, mask=rest)


@kernel
def _enter(
    q, k, v, slots, k_cache, v_cache, positions, frequencies, magnitude, q_weight, k_weight, eps,
    q_stride, k_stride, v_stride, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, NEOX: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # of keys and values, and behind them of queries
    position = tl.load(positions + token)
    if head >= KV_HEADS:  # only where something is done to queries
        here = q + token * q_stride + (head - KV_HEADS) * KEY
        _head(
            here, here, q_weight, eps, position, frequencies, magnitude, KEY, KEY_PAD, HALF,
            HALF_PAD, NEOX, NORMED, False,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            line = (slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK
            _head(
                k + token * k_stride + head * KEY, k_cache + line * KEY, k_weight, eps, position,
                frequencies, magnitude, KEY, KEY_PAD, HALF, HALF_PAD, NEOX, NORMED, True,
            )  # fmt: skip
            dim = tl.arange(0, VALUE_PAD)
            source = v + token * v_stride + head * VALUE + dim
            value = tl.load(source, mask=dim < VALUE, other=0.0)
            tl.store(v_cache + line * VALUE + dim, value, mask=dim < VALUE)


def enter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    frequencies: Tensor | None = None,
    magnitude: float = 1.0,
    neox: bool = True,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Normalises every head of q and k, rotates its first 2 * len(frequencies) channels, q in
    place and k on its way to the cache, and stores each token's keys and values at its slot.

    Args:
        q: (tokens, heads, key) float32; heads and channels of a token contiguous, as of k and v.
        k: (tokens, kv_heads, key) float32; left as it is.
        v: (tokens, kv_heads, value) float32.
        slots: (tokens,) int64, block * block_size + offset; -1 is skipped.
        k_cache, v_cache: (blocks, kv_heads, block_size, dim).
        positions: (tokens,) int64.
        frequencies: (rotated / 2,) float32, radians per position; None for no rotation.
        magnitude: factor on cosine and sine.
        neox: pairs are (i, i + half); otherwise (2i, 2i + 1).
        norms: weights (key,) float32 of the RMSNorms of q and k, and what is added to the mean
            square; None for no norm.
    """
    tokens, heads, key = k.shape
    value = v.shape[2]
    half = 0 if frequencies is None else len(frequencies)
    q_weight, k_weight, eps = norms or (q, k, 0.0)
    _enter[(tokens, heads + (q.shape[1] if half or norms else 0))](
        q, k, v, slots, k_cache, v_cache, positions, q if frequencies is None else frequencies,
        float(magnitude), q_weight, k_weight, float(eps), q.stride(0), k.stride(0), v.stride(0),
        KV_HEADS=heads, KEY=key,
        VALUE=value, KEY_PAD=power_of_two(key), VALUE_PAD=power_of_two(value),
        BLOCK=k_cache.shape[2], HALF=half, HALF_PAD=power_of_two(max(half, 1)),
        NEOX=neox, NORMED=norms is not None, num_warps=1,
    )  # fmt: skip


def enter_twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    frequencies: Tensor | None = None,
    magnitude: float = 1.0,
    neox: bool = True,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """`enter` in plain torch; the truth it is held against."""
    if norms is not None:
        q.copy_(norm_twin(q, norms[0], norms[2]))
        k = norm_twin(k, norms[1], norms[2])
    if frequencies is not None:
        q.copy_(rotated(q, positions, frequencies, magnitude, neox))
        k = rotated(k, positions, frequencies, magnitude, neox)
    live = slots >= 0
    block, offset = slots[live] // k_cache.shape[2], slots[live] % k_cache.shape[2]
    k_cache[block, :, offset] = k[live].to(k_cache.dtype)
    v_cache[block, :, offset] = v[live].to(v_cache.dtype)


def rotated(
    x: Tensor, positions: Tensor, frequencies: Tensor, magnitude: float, neox: bool
) -> Tensor:
    """(tokens, heads, width) float32 with its first channels rotated as `enter` says."""
    half = frequencies.shape[0]
    angle = (positions[:, None].double() * frequencies.double())[:, None]
    cosine, sine = ((f(angle) * magnitude).float() for f in (torch.cos, torch.sin))
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if neox:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)
    else:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)
    return torch.cat([turned, rest], -1)
