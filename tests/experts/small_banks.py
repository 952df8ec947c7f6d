"""Layers of a few small experts, routes to them, and a step through all; on a GPU if there is one,
else their kernels run under the interpreter."""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from greenroom.experts.beside import ExpertsBeside
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.slabs import SplitMatrices
from greenroom.gguf import GGMLType, random_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, F, EXPERTS, LAYERS, K = 64, 96, 5, 3, 2


def bank(pool, seed: int, lazy: bool = False) -> CpuExperts:
    rng = np.random.default_rng(seed)
    sizes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    matrices = [
        SplitMatrices(
            name, GGMLType.Q8_0,
            np.stack([random_blocks(GGMLType.Q8_0, *size, rng) for _ in range(EXPERTS)]),
        )
        for name, size in sizes.items()
    ]  # fmt: skip
    return CpuExperts(pool, tuple(matrices), lazy=lazy)


def routes(tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, D, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(tokens)])
    weights = torch.rand(tokens, K, generator=generator)
    return tuple(part.to(DEVICE) for part in (hidden, ids.int(), weights))


def step(layers: list[ExpertsBeside], tokens: int, seed: int) -> torch.Tensor:
    """A step in which every layer gets what the one before gave."""
    hidden, _, _ = routes(tokens, seed)
    for i, layer in enumerate(layers):
        _, ids, weights = routes(tokens, seed + i)
        layer.start(hidden, ids, weights)
        hidden = layer.finish(hidden if i % 2 else None)
        hidden = hidden / hidden.norm(dim=1, keepdim=True)
    return hidden
