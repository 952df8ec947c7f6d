"""Prints the speed of the native attention against torch's, in one run.

Usage: PYTHONPATH=src python bench/attention.py [threads]
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from greenroom import native
from greenroom.layers import native_ops

BLOCK = 32
SHAPES = {  # heads, kv heads, head width
    "qwen3-30b-a3b": (32, 4, 128),
    "gpt-oss-20b": (64, 8, 64),
    "olmoe": (16, 16, 128),
}


def median_seconds(call: Callable[[], object], repeats: int = 11) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def inputs(queries: int, context: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    """One sequence with a float16 cache: the tensor arguments of `attention`."""
    blocks = -(-context // BLOCK)
    cache = torch.randn(2, blocks, kv_heads, BLOCK, width).half()
    tables = torch.arange(blocks, dtype=torch.int32)[None]
    starts, contexts = torch.tensor([0, queries]).int(), torch.tensor([context]).int()
    return [torch.randn(queries, heads, width), cache[0], cache[1], tables, starts, contexts]


def report(name: str, pool: native_ops.Pool, queries: int, context: int) -> None:
    heads, kv_heads, width = SHAPES[name]
    arguments = inputs(queries, context, heads, kv_heads, width)
    ours = median_seconds(lambda: native_ops.attention(pool, *arguments, width**-0.5))
    q = torch.randn(1, heads, queries, width)
    k, v = torch.randn(2, 1, heads, context, width)
    theirs = median_seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)
    )
    pairs = queries * context - queries * (queries - 1) / 2
    print(
        f"{name:14} {queries:5} {context:6}  {ours * 1e6:9.1f} us  "
        f"{4 * pairs * heads * width / ours / 1e9:7.1f} GFLOP/s  "
        f"{4 * context * kv_heads * width / ours / 1e9:6.1f} GB/s  torch {theirs * 1e6:9.1f} us"
    )


def main() -> None:
    pool = native_ops.new_pool(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    torch.set_num_threads(pool.size)
    print(f"{native.lib().tier}, {pool.size} threads; float16 cache, torch float32 without GQA")
    print(f"{'shape':14} queries context")
    for name in SHAPES:
        for queries, context in [(512, 512), (1, 512), (1, 4096)]:
            report(name, pool, queries, context)


if __name__ == "__main__":
    main()
