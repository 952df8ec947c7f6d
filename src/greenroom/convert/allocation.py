"""Spends bytes on experts where they save most error: how much rounding to a type costs each
expert, and a greedy choice under a size. Knows tensors and types; not files of traces.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from greenroom.convert.quantisers import Quantisers
from greenroom.gguf import GGMLType, TensorInfo, dequantize

Ints = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_SAMPLE_ROWS = 32  # of a matrix: rows of one matrix are much alike


def rounding_errors(tensor: TensorInfo, types: Sequence[GGMLType], quantisers: Quantisers) -> Reals:
    """What rounding an expert's matrix to a type takes away, relative to what is there.

    Args:
        tensor: (experts, rows, columns).
        types: candidates; the tensor's own costs nothing.
        quantisers: with the importance of columns, if it is known.

    Returns:
        (experts, types): squared error over squared values, on rows taken evenly.
    """
    experts, rows, _ = tensor.shape
    picked = np.linspace(0, rows - 1, min(rows, _SAMPLE_ROWS)).astype(int)
    raw = np.stack([tensor.expert(e).reshape(rows, -1)[picked] for e in range(experts)])
    values = np.asarray(dequantize(tensor.type, raw), np.float32)
    weights = quantisers.weights(tensor.name)
    total = np.maximum((weights * np.square(values)).sum((1, 2), dtype=np.float64), 1e-30)
    out = np.zeros((experts, len(types)))
    for type in set(types) - {tensor.type}:
        rounded = dequantize(type, quantisers.encoder(tensor.name)(type, values))
        lost = (weights * np.square(rounded - values)).sum((1, 2), dtype=np.float64)
        out[:, [t == type for t in types]] = (lost / total)[:, None]
    return out


def spend(cost: Reals, bytes_of: Ints, room: int) -> Ints:
    """The candidate each expert gets: the smallest first, then, as long as there is room, the
    change that saves most cost per byte.

    Args:
        cost: (layers, experts, candidates).
        bytes_of: one expert's bytes, (layers, candidates).
        room: bytes beyond the smallest.

    Returns:
        (layers, experts) indices of candidates.
    """
    layers, experts, _ = cost.shape
    chosen = np.repeat(bytes_of.argmin(1)[:, None], experts, 1)
    heap: list[tuple[float, int, int, int]] = []

    def offer(layer: int, expert: int) -> None:
        now = chosen[layer, expert]
        more = bytes_of[layer] - bytes_of[layer, now]
        saved = cost[layer, expert, now] - cost[layer, expert]
        rate = np.where(more > 0, saved / np.maximum(more, 1), 0)
        best = int(rate.argmax())
        if rate[best] > 0:
            heapq.heappush(heap, (-float(rate[best]), layer, expert, best))

    for layer in range(layers):
        for expert in range(experts):
            offer(layer, expert)
    while heap:
        _, layer, expert, best = heapq.heappop(heap)
        more = int(bytes_of[layer, best] - bytes_of[layer, chosen[layer, expert]])
        if more <= room:
            room -= more
            chosen[layer, expert] = best
            offer(layer, expert)
    return chosen
