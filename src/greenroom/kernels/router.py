"""The router on the GPU: expert logits in float32, the choice of k experts and their weights.

Two kernels, none of which waits for the host, so a captured step can hold them. Equal logits go
to the lower expert, as on the CPU. Knows nothing of where experts live.
"""

import torch
import triton.language as tl
from torch import Tensor

from greenroom.kernels.launch import kernel, power_of_two

WIDE = 4096  # most columns a program of `_logits` reads at once

RULES = {"softmax": 0, "softmax_selected": 1, "sparse_mixer": 2}


@kernel
def _logits(
    x,
    weight,
    bias,
    out,
    width,
    experts,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + token * width + column, mask=inside, other=0.0)
        total += value * tl.load(weight + expert * width + column, mask=inside, other=0.0)
    logit = tl.sum(total)
    if BIASED:
        logit += tl.load(bias + expert)
    tl.store(out + token * experts + expert, logit)


@kernel
def _choose(
    logits,
    ids,
    weights,
    experts,
    scale,
    tolerance,
    RULE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    slot = tl.arange(0, K_PAD)
    low = float("-inf")
    row = tl.load(logits + token * experts + index, mask=index < experts, other=low)
    left = row
    chosen = tl.zeros([K_PAD], tl.int32)
    kept = tl.full([K_PAD], low, tl.float32)
    for i in range(K):
        best = tl.max(left)
        # The lowest of equal ones; a row of no numbers at all must still name an expert.
        expert = tl.min(tl.where(left == best, index, experts - 1))
        if RULE == 2:
            spread = (best - row) / tl.maximum(tl.abs(row), best)
            near = (left > low) & ((spread > tolerance) == 0)
            best = 1.0 / tl.sum(tl.where(near, tl.exp(left - best), 0.0))
        chosen = tl.where(slot == i, expert, chosen)
        kept = tl.where(slot == i, best, kept)
        left = tl.where(index == expert, low, left)
    if RULE != 2:
        top = tl.max(kept)
        value = tl.exp(kept - top)
        if (RULE == 1) | RENORMALISE:
            kept = value / tl.sum(value) * scale
        else:
            kept = value / tl.sum(tl.exp(row - top)) * scale
    tl.store(ids + token * K + slot, chosen, mask=slot < K)
    tl.store(weights + token * K + slot, kept, mask=slot < K)


def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Expert logits; sums in float32, no operand rounded.

    Args:
        x: (tokens, d) float32, contiguous.
        weight: (experts, d) float32, contiguous.
        bias: (experts,) float32 or None.

    Returns:
        (tokens, experts) float32.
    """
    tokens, width = x.shape
    experts = weight.shape[0]
    out = torch.empty(tokens, experts, device=x.device)
    _logits[(tokens, experts)](
        x, weight, weight if bias is None else bias, out, width, experts,
        BIASED=bias is not None, BLOCK=min(WIDE, power_of_two(width)), num_warps=8,
    )  # fmt: skip
    return out


def choose(
    values: Tensor,
    gating: str,
    k: int,
    renormalise: bool = False,
    scale: float = 1.0,
    jitter: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The experts of each token, best first, and their weights; see `layers.router.Rule`.

    Args:
        values: (tokens, experts) float32 logits, contiguous.
        gating: a key of RULES.
        k: experts per token.
        renormalise: the weights of a token add up to 1; "softmax" only.
        scale: factor of the weights; "softmax" only.
        jitter: of "sparse_mixer".

    Returns:
        ids (tokens, k) int32, weights (tokens, k) float32.
    """
    tokens, experts = values.shape
    ids = torch.empty(tokens, k, dtype=torch.int32, device=values.device)
    weights = torch.empty(tokens, k, device=values.device)
    _choose[(tokens,)](
        values, ids, weights, experts, float(scale), 2.0 * jitter,
        RULE=RULES[gating], RENORMALISE=renormalise, K=k, K_PAD=power_of_two(k),
        BLOCK=power_of_two(experts), num_warps=1 if experts <= 128 else 4,
    )  # fmt: skip
    return ids, weights
