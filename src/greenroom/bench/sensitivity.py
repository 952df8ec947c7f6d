"""How much an error in an expert's outputs changes what a model predicts, expert by expert.

Noise on the routed output of one layer at a time shows what the layers behind it make of an
error; a layer's part is shared among its experts by the squared size of what each adds. Works on
any backend. Knows engines and texts; not what rounds weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from greenroom.bench.quality import Floats, Progress, Spool, Windows, evaluate
from greenroom.experts.trace import ERRORS

if TYPE_CHECKING:
    from greenroom.engine import LLM

MOST_TOKENS = 1024  # the text passes the model twice for every layer


class Shares:
    """Routed experts that are also called one route at a time, to see what each adds.

    Args:
        experts: of a layer, on any backend.
        count: how many there are.

    Attributes:
        sums: (count,) float64, over all tokens, each expert's share of the token's squared sizes.
    """

    def __init__(self, experts: Any, count: int) -> None:
        self.experts = experts
        self.sums = np.zeros(count)

    @property
    def nbytes(self) -> int:
        """Bytes of the experts."""
        return int(self.experts.nbytes)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the experts compute; arguments as theirs."""
        sizes = torch.empty(ids.shape, dtype=torch.float64)
        for place in range(ids.shape[1]):
            one, weight = (t[:, place : place + 1].contiguous() for t in (ids, weights))
            sizes[:, place] = self.experts(hidden, one, weight).square().sum(-1)
        sizes /= sizes.sum(-1, keepdim=True).clamp(min=1e-30)
        np.add.at(self.sums, ids.cpu().numpy(), sizes.numpy())
        out: Tensor = self.experts(hidden, ids, weights)
        return out


class Noisy:
    """Routed experts whose output gets noise, the same in every run.

    Args:
        experts: of a layer, on any backend.
        size: of the noise, relative to each token's output.
    """

    def __init__(self, experts: Any, size: float) -> None:
        self.experts = experts
        self.size = size
        self.generator = torch.Generator().manual_seed(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the experts."""
        return int(self.experts.nbytes)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the experts compute, and noise; arguments as theirs."""
        out: Tensor = self.experts(hidden, ids, weights)
        noise = torch.randn(out.shape, generator=self.generator).to(out.device)
        return out + self.size * out.square().mean(-1, keepdim=True).sqrt() * noise


def measure(llm: "LLM", windows: Windows, progress: Progress | None = None) -> Floats:
    """The sensitivity of a model's experts, on MOST_TOKENS of the text.

    Args:
        llm: the model.
        windows: the text.
        progress: told how many positions of all passes are done.

    Returns:
        (moe_layers, experts, 2) float64: nats of divergence that errors of the sizes ERRORS in
        an expert's outputs cause.
    """
    model: Any = llm.engine.model
    config = llm.engine.model_config
    windows = thinned(windows)
    blocks = [model.blk[layer].ffn for layer in model.moe_layers]
    all_positions = (1 + len(ERRORS) * len(blocks)) * windows.positions

    def told(number: int) -> Progress | None:
        if progress is None:
            return None
        return lambda at, _: progress(number * windows.positions + at, all_positions)

    spool = Spool(windows, config.vocabulary_size)
    try:
        with _replaced(blocks, partial(Shares, count=config.moe.experts)) as metered:
            evaluate(llm, windows, keep=spool, progress=told(0))
        found = np.stack([one.sums / max(one.sums.sum(), 1e-30) for one in metered])
        divergence = np.zeros((len(blocks), 1, len(ERRORS)))
        for number, (layer, level) in enumerate(product(range(len(blocks)), range(len(ERRORS)))):
            with _replaced([blocks[layer]], partial(Noisy, size=ERRORS[level])):
                scores = evaluate(llm, windows, spool, progress=told(number + 1))
            divergence[layer, 0, level] = np.concatenate(scores.kl).mean()
    finally:
        spool.close()
    return np.asarray(found[..., None] * divergence)


@contextmanager
def _replaced(blocks: Sequence[Any], make: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """MoE blocks with what `make` makes of their experts in their place."""
    before = [block.experts for block in blocks]
    try:
        for block, experts in zip(blocks, before, strict=True):
            block.experts = make(experts)
        yield [block.experts for block in blocks]
    finally:
        for block, experts in zip(blocks, before, strict=True):
            block.experts = experts


def thinned(windows: Windows, most: int = MOST_TOKENS) -> Windows:
    """Evenly taken windows of about `most` tokens; at least one."""
    tokens = windows.tokens
    count = min(len(tokens), max(1, most // windows.context))
    picked = np.linspace(0, len(tokens) - 1, count).round().astype(int)
    return replace(windows, tokens=tuple(tokens[i] for i in picked))
