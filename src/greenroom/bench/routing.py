"""Statistics of a trace: how unevenly experts are used, how soon again, and what a cache of
experts would have hit under several policies. NumPy on traces only; loads no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greenroom.experts.residency import EMPTY, Residency
from greenroom.experts.trace import NOBODY, Trace, steady_heat

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Routes = NDArray[np.signedinteger]

NEVER = np.iinfo(np.int64).max


def entropy(counts: Counts) -> Floats:
    """(layers,) bits: of the use of each layer's experts; log2(experts) if all are used alike.

    Args:
        counts: (layers, experts).
    """
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    terms = share * np.log2(np.where(share > 0, share, 1))
    return np.asarray(-terms.sum(-1))


def gini(counts: Counts) -> Floats:
    """(layers,): 0 if all experts are used alike, (experts - 1) / experts if one does all."""
    ordered = np.sort(counts, -1)
    n, total = counts.shape[-1], np.maximum(counts.sum(-1), 1)
    ranks = np.arange(1, n + 1)
    found = 2 * (ranks * ordered).sum(-1) / (n * total) - (n + 1) / n
    return np.asarray(found * (counts.sum(-1) > 0))


def imbalance(counts: Counts) -> dict[str, Floats]:
    """Per layer: the busiest expert over the mean, coefficient of variation, Gini, entropy."""
    mean = np.maximum(counts.mean(-1), 1e-300)
    return {
        "max_over_mean": counts.max(-1) / mean,
        "coefficient_of_variation": counts.std(-1) / mean,
        "gini": gini(counts),
        "entropy_bits": entropy(counts),
    }


def complete(trace: Trace) -> Routes:
    """(tokens, layers, k): only the tokens every layer computed."""
    return np.asarray(trace.routes[(trace.routes != NOBODY).all((1, 2))])


def coactivation(routes: Routes, experts: int) -> Counts:
    """(layers, experts, experts) int64: tokens that used both; the diagonal counts one."""
    tokens, layers, _ = routes.shape
    found = np.zeros((layers, experts, experts), np.int64)
    for layer in range(layers):
        used = np.zeros((tokens, experts), np.float32)
        np.put_along_axis(used, routes[:, layer].astype(np.int64), 1, 1)
        found[layer] = np.rint(used.T @ used).astype(np.int64)
    return found


def lift(pairs: Counts, tokens: int) -> Floats:
    """(layers, experts, experts): how much more often two experts meet than by chance; 0 where
    one is never used, and on the diagonal.
    """
    single = np.diagonal(pairs, axis1=1, axis2=2) / max(tokens, 1)
    chance = single[:, :, None] * single[:, None, :]
    found = np.divide(pairs / max(tokens, 1), chance, out=np.zeros(pairs.shape), where=chance > 0)
    experts = np.arange(pairs.shape[1])
    found[:, experts, experts] = 0
    return found


def reuse_distances(routes: Routes, experts: int) -> Counts:
    """(layers, experts + 1) int64: how many uses had so many other experts of their layer used
    since the expert's own last use; the last column counts first uses.

    Args:
        routes: (tokens, layers, k); the k routes of a token count one after another.
    """
    _, layers, _ = routes.shape
    last = np.full((layers, experts), -1, np.int64)
    found = np.zeros((layers, experts + 1), np.int64)
    rows = np.arange(layers)
    for time, ids in enumerate(np.moveaxis(routes, 1, 2).reshape(-1, layers)):
        before = last[rows, ids]
        distance = (last > before[:, None]).sum(-1)
        found[rows, np.where(before < 0, experts, distance)] += 1
        last[rows, ids] = time
    return found


# A policy turns (use counts, last uses, next uses), each (layers, experts), into how much each
# expert deserves to stay; the lowest leaves.
Policy = Callable[[Counts, Counts, Counts], Floats]


def lru(counts: Counts, last: Counts, following: Counts) -> Floats:
    """The expert not used for the longest time leaves."""
    return last.astype(np.float64)


def lfu(counts: Counts, last: Counts, following: Counts) -> Floats:
    """The expert used least often so far leaves, among equals the one not used for longest."""
    return np.asarray(counts + last / (last.max() + 2.0))


def belady(counts: Counts, last: Counts, following: Counts) -> Floats:
    """The expert that will not be used for the longest time leaves: no policy hits more."""
    return -following.astype(np.float64)


POLICIES: dict[str, Policy] = {"LRU": lru, "LFU": lfu, "clairvoyant": belady}


def next_uses(routes: Routes, experts: int) -> Counts:
    """(uses, layers) int64: when the expert used there is used again, NEVER if not."""
    _, layers, _ = routes.shape
    order = np.moveaxis(routes, 1, 2).reshape(-1, layers)
    found = np.full(order.shape, NEVER)
    coming = np.full((layers, experts), NEVER)
    rows = np.arange(layers)
    for time in range(len(order) - 1, -1, -1):
        found[time] = coming[rows, order[time]]
        coming[rows, order[time]] = time
    return found


def hit_rates(routes: Routes, experts: int, sizes: Sequence[int], policy: Policy) -> Floats:
    """(sizes,) share of uses that hit a cache with so many slots in each layer.

    The clairvoyant may leave a missed expert out where that pays, as this engine can: a miss is
    computed in RAM. The others always take it in.

    Args:
        routes: (tokens, layers, k); the k routes of a token count one after another.
        experts: in each layer.
        sizes: slots in each layer, 0 to experts.
        policy: who leaves.
    """
    _, layers, _ = routes.shape
    following = next_uses(routes, experts)
    room = np.asarray(sizes)
    held = np.zeros((len(room), layers, experts), bool)
    counts, last = (np.full((layers, experts), start, np.int64) for start in (0, -1))
    coming = np.full((layers, experts), NEVER)
    hits, rows = np.zeros(len(room), np.int64), np.arange(layers)
    for time, ids in enumerate(np.moveaxis(routes, 1, 2).reshape(-1, layers)):
        counts[rows, ids] += 1
        last[rows, ids] = time
        coming[rows, ids] = following[time]
        present = held[:, rows, ids]
        hits += present.sum(-1)
        held[:, rows, ids] = True
        size, layer = np.nonzero((held.sum(-1) > room[:, None]) & ~present)
        if not len(size):
            continue
        worth = np.where(held[size, layer], policy(counts, last, coming)[layer], np.inf)
        if policy is not belady:
            empty = room[size] == 0
            worth[np.arange(len(size)), ids[layer]] = np.where(empty, -np.inf, np.inf)
        held[size, layer, worth.argmin(-1)] = False
    return np.asarray(hits / max(routes.size, 1))


@dataclass(frozen=True, slots=True)
class Simulation:
    """What our policy would have hit with `slots` shared by all layers.

    Attributes:
        cold: share of uses that hit, starting with empty slots.
        warm: the same over the same tokens, starting with the experts popular before.
        first_cold, first_warm: over the first tokens only.
        promotions: copies per token, cold start.
    """

    slots: int
    cold: float
    warm: float
    first_cold: float
    first_warm: float
    promotions: float


def simulate(
    routes: Routes, experts: int, slots: int, heat: Floats | None = None, limit: int = 8
) -> tuple[NDArray[np.bool_], int]:
    """Runs the residency policy over a trace, one token a step.

    Args:
        routes: (tokens, layers, k).
        experts: in each layer.
        slots: shared by all layers.
        heat: (layers, experts) to start from, its hottest experts resident; None: empty slots.
        limit: promotions per step.

    Returns:
        hits (tokens, layers, k), and the number of promotions after the start.
    """
    policy = Residency(routes.shape[1], experts, slots)
    if heat is not None:
        policy.warm(heat)
        for move in policy.plan(slots):
            policy.apply(move)
    hits = np.zeros(routes.shape, bool)
    rows, promotions = np.arange(routes.shape[1])[:, None], 0
    for token, ids in enumerate(routes):
        hits[token] = policy.slot_of[rows, ids] != EMPTY
        policy.observe(ids)
        for move in policy.plan(limit):
            policy.apply(move)
            promotions += 1
    return hits, promotions


def warm_gain(routes: Routes, experts: int, slots: int, first: int = 64) -> Simulation:
    """Our policy on the second half of the tokens: cold, and warmed with the first half."""
    half = len(routes) // 2
    before, after = routes[:half], routes[half:]
    layers = np.broadcast_to(np.arange(routes.shape[1])[:, None], before.shape[1:])
    counts = np.zeros((routes.shape[1], experts), np.int64)
    np.add.at(counts, (np.broadcast_to(layers, before.shape), before), 1)
    cold, promotions = simulate(after, experts, slots)
    warm, _ = simulate(after, experts, slots, steady_heat(counts, half))
    return Simulation(
        slots,
        float(cold.mean()),
        float(warm.mean()),
        float(cold[:first].mean()),
        float(warm[:first].mean()),
        promotions / len(after),
    )


def cache_sizes(experts: int, most: int = 33) -> list[int]:
    """Slots per layer to simulate: all from 0 to `experts`, thinned out if there are many."""
    return sorted({round(i) for i in np.linspace(0, experts, min(experts + 1, most))})
