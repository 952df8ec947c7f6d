"""Finds and draws likely tokens in one row of logits without sorting the vocabulary.

Plain NumPy on one row; every function is exact. Knows nothing of requests.
"""

import math

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]  # (vocabulary,) logits; -inf where a token is not allowed
Ids = NDArray[np.int64]

_GROUP = 256  # tokens per group when looking for a lower bound of the k-th largest
_LIKELY = 64  # candidates that usually hold the nucleus, and few enough to sort
_SPAN = 512  # tokens per partial sum when drawing from the whole vocabulary


def top(row: Row, k: int) -> Ids:
    """Ids of the k largest finite values, largest first, equal ones by id; (<= k,) int64."""
    k = min(k, row.size)
    groups = row.size // _GROUP
    if 4 * k <= groups:
        # At least k values reach the k-th largest of the groups' maxima, so everything that
        # belongs to the top k does: one pass for the maxima, one for the comparison.
        maxima = row[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        floor = np.partition(maxima, groups - k)[groups - k]
    else:
        floor = np.partition(row, row.size - k)[row.size - k]
    ids = np.flatnonzero(row >= floor) if floor > -np.inf else np.flatnonzero(row > -np.inf)
    order = np.argsort(-row[ids], kind="stable")[:k]
    return ids[order]


def log_sum_exp(row: Row) -> float:
    """log(sum(exp(row))), the natural log of the softmax's denominator."""
    largest = float(row.max())
    return largest + math.log(float(np.exp(row - np.float32(largest)).sum(dtype=np.float64)))


def draw(
    row: Row, uniform: float, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """Draws a token from softmax(row / temperature), cut by top-k, then top-p, then min-p.

    Args:
        row: (vocabulary,) float32 logits.
        uniform: a random number in [0, 1).
        temperature: more than 0.
        top_k, top_p, min_p: as in SamplingParams; 0, 1 and 0 switch them off.
    """
    scale = np.float32(1.0 / temperature)
    largest = row.max()
    if top_k:
        ids = top(row, top_k)
        weights = np.exp((row[ids] - largest) * scale)
        if top_p < 1.0:
            keep = _nucleus(weights, top_p * float(weights.sum(dtype=np.float64)))
            ids, weights = ids[:keep], weights[:keep]
    elif top_p < 1.0:
        ids, weights = _top_p(row, scale, largest, top_p)
    elif min_p > 0.0:
        floor = largest + np.float32(math.log(min_p) * temperature)
        ids = np.flatnonzero(row >= floor)
        weights = np.exp((row[ids] - largest) * scale)
    else:
        return _pick_from_all(np.exp((row - largest) * scale), uniform)
    if min_p > 0.0:
        # The likeliest token has weight 1 and is never cut, so min-p needs no new sum.
        keep_mask = weights >= min_p
        ids, weights = ids[keep_mask], weights[keep_mask]
    return int(ids[_pick(weights, uniform)])


def _top_p(row: Row, scale: np.float32, largest: np.float32, top_p: float) -> tuple[Ids, Row]:
    weights = np.exp((row - largest) * scale)
    total = float(weights.sum(dtype=np.float64))
    ids = top(row, _LIKELY)
    if float(weights[ids].sum(dtype=np.float64)) >= top_p * total:
        ids = ids[: _nucleus(weights[ids], top_p * total)]
    else:
        ids = _wide_nucleus(weights, top_p * total)
    return ids, weights[ids]


def _wide_nucleus(weights: Row, goal: float) -> Ids:
    """The fewest largest weights that reach the goal, in the order of ids, of equal ones the first.
    Sorting values alone, which processors do many at a time, tells how small the last one is.
    """
    falling = np.sort(weights)[::-1]
    count = _nucleus(falling, goal)
    least = falling[count - 1]
    found = weights > least
    found[np.flatnonzero(weights == least)[: count - np.count_nonzero(found)]] = True
    return np.flatnonzero(found)


def _nucleus(weights: Row, goal: float) -> int:
    """How many of the weights, largest first, it takes to reach the goal; at least one."""
    reached = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(reached, goal, side="left")) + 1, weights.size)


def _pick(weights: Row, uniform: float) -> int:
    reached = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(reached, uniform * reached[-1], side="right"))
    return min(index, int(np.searchsorted(reached, reached[-1], side="left")))


def _pick_from_all(weights: Row, uniform: float) -> int:
    """Like _pick, but sums spans first, so that only one span needs its running sum."""
    spans = weights.size // _SPAN
    whole = weights[: spans * _SPAN].reshape(spans, _SPAN).sum(axis=1)
    sums = np.append(whole, weights[spans * _SPAN :].sum())
    reached = np.cumsum(sums, dtype=np.float64)
    goal = uniform * reached[-1]
    span = _pick(sums, uniform)
    before = reached[span] - sums[span]
    part = weights[span * _SPAN : (span + 1) * _SPAN]
    share = min(max((goal - before) / float(sums[span]), 0.0), 1.0 - 2**-53)
    return span * _SPAN + _pick(part, share)
