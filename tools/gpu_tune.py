"""Time the expert kernels on this machine's GPU over a small grid of tile sizes.

    python tools/gpu_tune.py [--quick] [--decode]

Prints microseconds, GB/s of weights and the best choice for: experts in slots (one token),
dense matrices (one to sixteen tokens), expanding a slab, one expert of a long step, all experts
of a layer straight from their slots, and copies from pinned and pageable slabs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
import triton

from greenroom.experts import tiers
from greenroom.experts.limits import EXPERT_ROWS
from greenroom.experts.resident import ResidentMlp
from greenroom.experts.slabs import SlabLayout, allocate
from greenroom.experts.stream import GroupMlp, Step
from greenroom.gguf import GGMLType
from greenroom.kernels import dequantise as expand
from greenroom.kernels import direct
from greenroom.kernels import experts as kernels
from greenroom.kernels import matvec as dense
from greenroom.kernels.expert_rows import scaled_rows
from greenroom.kernels.grouped import Group, Routes
from greenroom.kernels.lines import Walk
from greenroom.kernels.planes import order, split

EXPERTS = {"gpt-oss-20b": 32, "qwen3-30b-a3b": 128}  # of a layer
# Rows, columns, blocks of 32 columns, warps and stages of `kernels.direct`.
TILES = [
    (32, 128, 2, 4, 3), (64, 128, 2, 4, 3), (64, 128, 4, 4, 2), (128, 128, 2, 8, 3),
    (128, 128, 4, 8, 2), (128, 256, 2, 8, 3),
]  # fmt: skip
SHAPES: dict[str, Any] = {
    "gpt-oss-20b": ((39, 39, 39), 2880, 2880, True, 4, "gpt-oss"),
    "qwen3-30b-a3b": ((12, 12, 14), 2048, 768, False, 8, "silu"),
}


def timed(body: Callable[[], object]) -> float:
    """Seconds of one run inside a captured graph, the median of a few."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            body()
    return float(triton.testing.do_bench(graph.replay, warmup=5, rep=30)) / 8e3


def slots_of(layout: SlabLayout, count: int) -> torch.Tensor:
    """Slots of bytes that are valid, small numbers in every format."""
    return torch.full((count, layout.nbytes), 0x11, dtype=torch.uint8, device="cuda")


def next_routes(
    routes: Iterator[torch.Tensor], compute: Callable[[torch.Tensor], object]
) -> object:
    """A call with experts the cache does not hold."""
    return compute(next(routes))


def on_slots(
    memory: torch.Tensor,
    table: torch.Tensor,
    layout: SlabLayout,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    ids: torch.Tensor,
) -> object:
    """`kernels.hits` with the routes last."""
    return kernels.hits(memory, table, layout, hidden, ids, weights, activation)


def tune_hits(name: str, quick: bool) -> None:
    kinds, d, f, biased, k, activation = SHAPES[name]
    layout = SlabLayout.plan(tuple(GGMLType(kind) for kind in kinds), d, f, biased)
    count = max(64, (600 << 20) // layout.nbytes)  # more than the cache holds
    memory = slots_of(layout, count)
    table = torch.randperm(count, device="cuda").int()
    best: tuple[float, str] = (1e9, "")
    grid = [(16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)]  # groups of sixteen columns
    for tokens in (1,) if quick else (1, 8, 32):
        hidden = torch.randn(tokens, d, device="cuda")
        weights = torch.rand(tokens, k, device="cuda")
        for lines, kernels.WARPS in grid:
            kernels.LINES = kernels.TABLE_LINES = lines
            compute = partial(on_slots, memory, table, layout, hidden, weights, activation)
            shape = (8, tokens, k)
            routes = cycle(torch.randint(0, count, shape, device="cuda", dtype=torch.int32))
            seconds = timed(partial(next_routes, routes, compute))
            rate = tokens * k * layout.nbytes / seconds / 1e9
            choice = f"lines {lines} warps {kernels.WARPS}"
            print(f"hits {name} {tokens:2} tokens {choice}: {seconds * 1e6:.1f} us {rate:.0f} GB/s")
            if tokens == 1:
                best = min(best, (seconds, choice))
    print(f"hits {name} best: {best[1]}", flush=True)


def grouped_step(experts: int, rows: int, d: int) -> tuple[Step, Group]:
    """A step in which each of a few experts has so many rows."""
    ids = torch.arange(experts, dtype=torch.int32, device="cuda").repeat(rows)[:, None]
    base = torch.arange(experts, dtype=torch.int32, device="cuda")
    table = torch.stack([base, base * rows, base, base * 0])
    routes = Routes.sort(ids, torch.rand(experts * rows, 1, device="cuda"), table)
    hidden = torch.randn(experts * rows, d, device="cuda")
    step = Step(routes, *scaled_rows(hidden), torch.zeros_like(hidden), EXPERT_ROWS)
    return step, Group(0, 0, (rows,) * experts)


def tune_stream(name: str) -> None:
    kinds, d, f, biased, _, activation = SHAPES[name]
    layout = SlabLayout.plan(tuple(GGMLType(kind) for kind in kinds), d, f, biased)
    slab = slots_of(layout, 1)[0]
    both = torch.empty(f, d, dtype=torch.float16, device="cuda")
    for expand.LINES in (16, 32, 64):
        seconds = timed(lambda: expand.dequantise(slab, kinds[0], both))
        print(f"expand {name} lines {expand.LINES}: {seconds * 1e6:.1f} us, "
              f"{2 * f * d / seconds / 1e9:.0f} GB/s written")  # fmt: skip
    expand.LINES = 32
    experts = 4  # computed together
    slabs = slots_of(layout, experts)
    scratch = torch.empty(experts * 2 * d * f, dtype=torch.float16, device="cuda")
    mlp = GroupMlp(layout, activation, scratch)
    for rows in (64, 256, 1024):
        step, group = grouped_step(experts, rows, d)
        body = partial(mlp, step, group, slabs)
        seconds = timed(body) / experts
        begin = time.perf_counter()
        for _ in range(50):
            body()
        host = (time.perf_counter() - begin) / 50 / experts
        torch.cuda.synchronize()
        rate = 6 * rows * d * f / seconds / 1e12
        device = f"device {seconds * 1e6:.0f} us, host {host * 1e6:.0f} us"
        print(f"expert {name} {rows} rows: {device}, {rate:.0f} TFLOP/s", flush=True)


def tune_resident(name: str) -> None:
    """A layer whose experts all have slots, in tiles of several sizes."""
    kinds, d, f, biased, k, activation = SHAPES[name]
    layout = SlabLayout.plan(tuple(GGMLType(kind) for kind in kinds), d, f, biased)
    count = EXPERTS[name]
    memory, table = slots_of(layout, count), torch.randperm(count, device="cuda").int()
    usual = direct.tile
    for tokens in (64, 512, 2048):
        hidden, weights = torch.randn(tokens, d, device="cuda"), torch.rand(tokens, k).cuda()
        ids = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)]).int().cuda()
        mlp = ResidentMlp(layout, activation, count, 8192)
        for tile in (None, *TILES):
            direct.tile = usual if tile is None else lambda rows, device, tile=tile: tile
            seconds = timed(partial(mlp, memory, table, hidden, ids, weights))
            rate = 6 * tokens * k * d * f / seconds / 1e12
            print(f"resident {name} {tokens} tokens, tile {tile or 'chosen'}: "
                  f"{seconds * 1e6:.0f} us, {rate:.0f} TFLOP/s", flush=True)  # fmt: skip
    direct.tile = usual


def tune_matvec(tokens: int) -> None:
    """Matrices of few tokens, one after another, more of them than the cache holds; their planes
    are made beforehand."""
    for rows, cols, kind in ((5120, 2880, 8), (2880, 4096, 8), (201088, 2880, 8), (5120, 2880, 39)):
        walk = Walk.of(kind, cols)
        size = rows // 16 * walk.group_bytes
        copies = max(2, (300 << 20) // size)
        packed = torch.full((copies, size), 0x11, dtype=torch.uint8, device="cuda")
        x = torch.randn(tokens, cols, device="cuda")
        planes = split(x, order(walk.constants))

        def known(
            x: torch.Tensor, kind: int, planes: tuple[torch.Tensor, torch.Tensor] = planes
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return planes

        for groups, warps in ((16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)):
            dense.GROUPS = dense.FOUR = dense.MORE = groups
            dense.GROUPS_WARPS = dense.FOUR_WARPS = dense.MORE_WARPS = warps
            turns = cycle(packed)
            seconds = timed(
                lambda: dense.matvec(next(turns), kind, rows, cols, x, None, known)  # noqa: B023
            )
            choice = f"{tokens} x {rows}x{cols} {GGMLType(kind).name} groups {groups} warps {warps}"
            rate = f"{seconds * 1e6:.1f} us {size / seconds / 1e9:.0f} GB/s"
            print(f"matvec {choice}: {rate}", flush=True)


def measure_copies() -> None:
    slabs = allocate(1 << 30).reshape(64, -1)
    slabs[:] = 1
    there = torch.empty(slabs.shape[1], dtype=torch.uint8, device="cuda")

    class Bank:
        block: np.ndarray[Any, Any] = slabs

    for state in ("pageable", "pinned"):
        begin = time.perf_counter()
        for slab in slabs:
            there.copy_(torch.from_numpy(slab), non_blocking=True)
        torch.cuda.synchronize()
        print(f"copies {state}: {slabs.nbytes / (time.perf_counter() - begin) / 1e9:.1f} GB/s")
        if state == "pageable":
            begin = time.perf_counter()
            tiers.pin(Bank())  # type: ignore[arg-type]
            print(f"pinning 1 GiB: {time.perf_counter() - begin:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--decode", action="store_true", help="only what a decode step runs")
    args = parser.parse_args()
    for tokens in (1, 4, 16):
        tune_matvec(tokens)
    if args.decode:
        tune_hits("gpt-oss-20b", quick=True)
        return
    measure_copies()
    for name in SHAPES:
        tune_stream(name)
        tune_resident(name)
        tune_hits(name, args.quick)


if __name__ == "__main__":
    main()
