"""Rotary embedding on the GPU, fused with writing keys and values into the paged cache.

Knows angles as a table of inverse frequencies; how they were scaled (YaRN, longrope) is decided
in `layers.rope`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x,
    positions,
    frequencies,
    magnitude,
    stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NEOX: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, HALF_PAD)
    inside = pair < HALF
    frequency = tl.load(frequencies + pair, mask=inside, other=0.0)
    # float64 angles: at position 100,000 float32 would lose three digits of the phase.
    angle = (tl.load(positions + token).to(tl.float64) * frequency.to(tl.float64)).to(tl.float64)
    turns = angle * 0.15915494309189535
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    cosine, sine = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    base = x + token * stride + head * WIDTH
    if NEOX:
        low, high = base + pair, base + pair + HALF
    else:
        low, high = base + 2 * pair, base + 2 * pair + 1
    a = tl.load(low, mask=inside, other=0.0)
    b = tl.load(high, mask=inside, other=0.0)
    tl.store(low, a * cosine - b * sine, mask=inside)
    tl.store(high, a * sine + b * cosine, mask=inside)


@triton.jit
def _write(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        line = (slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK
        dim = tl.arange(0, KEY_PAD)
        key = tl.load(k + token * k_stride + head * KEY + dim, mask=dim < KEY, other=0.0)
        tl.store(k_cache + line * KEY + dim, key, mask=dim < KEY)
        dim = tl.arange(0, VALUE_PAD)
        value = tl.load(v + token * v_stride + head * VALUE + dim, mask=dim < VALUE, other=0.0)
        tl.store(v_cache + line * VALUE + dim, value, mask=dim < VALUE)


def rotate(
    x: Tensor, positions: Tensor, frequencies: Tensor, magnitude: float, neox: bool
) -> Tensor:
    """Rotates the first 2 * len(frequencies) channels of every head in place and returns x.

    Args:
        x: (tokens, heads, width) float32; heads and channels contiguous.
        positions: (tokens,) int64.
        frequencies: (rotated / 2,) float32, radians per position.
        magnitude: factor on cosine and sine.
        neox: pairs are (i, i + half); otherwise (2i, 2i + 1).
    """
    tokens, heads, width = x.shape
    half = frequencies.shape[0]
    _rotate[(tokens, heads)](
        x, positions, frequencies, magnitude, x.stride(0), HEADS=heads, WIDTH=width, HALF=half,
        HALF_PAD=triton.next_power_of_2(half), NEOX=neox,
    )  # fmt: skip
    return x


def rotate_twin(
    x: Tensor, positions: Tensor, frequencies: Tensor, magnitude: float, neox: bool
) -> Tensor:
    """`rotate` in plain torch, not in place; the truth it is held against."""
    half = frequencies.shape[0]
    angle = (positions[:, None].double() * frequencies.double())[:, None]
    cosine, sine = ((f(angle) * magnitude).float() for f in (torch.cos, torch.sin))
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if neox:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)
    return torch.cat([turned, rest], -1)


def write_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Stores each token's keys and values at its slot; a slot of -1 is skipped.

    Args:
        k, v: (tokens, kv_heads, dim) float32; heads and channels contiguous.
        slots: (tokens,) int64, block * block_size + offset.
        k_cache, v_cache: (blocks, kv_heads, block_size, dim).
    """
    tokens, heads, key = k.shape
    value = v.shape[2]
    _write[(tokens, heads)](
        k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), KV_HEADS=heads, KEY=key,
        VALUE=value, KEY_PAD=triton.next_power_of_2(key), VALUE_PAD=triton.next_power_of_2(value),
        BLOCK=k_cache.shape[2],
    )  # fmt: skip


def write_kv_twin(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """`write_kv` in plain torch; the truth it is held against."""
    live = slots >= 0
    block, offset = slots[live] // k_cache.shape[2], slots[live] % k_cache.shape[2]
    k_cache[block, :, offset] = k[live].to(k_cache.dtype)
    v_cache[block, :, offset] = v[live].to(v_cache.dtype)
