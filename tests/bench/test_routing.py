"""Each statistic of a trace against a case computed by hand, and policies against each other."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.bench import routing
from greenroom.bench.routing import POLICIES, belady, hit_rates, lfu, lru
from greenroom.experts.trace import Trace


def sequence(*ids: int) -> np.ndarray:
    """One layer, one expert per token."""
    return np.array(ids, np.int16)[:, None, None]


def test_balance_by_hand() -> None:
    found = routing.imbalance(np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 2, 0, 6]]))
    assert found["max_over_mean"].tolist() == [1, 4, 3]
    assert found["gini"].tolist() == pytest.approx([0, 0.75, 0.625])
    three_quarters = 0.25 * 2 + 0.75 * np.log2(4 / 3)
    assert found["entropy_bits"].tolist() == pytest.approx([2, 0, three_quarters])
    assert found["coefficient_of_variation"].tolist() == pytest.approx(
        [0, np.sqrt(3), np.sqrt(6) / 2]
    )


def test_coactivation_by_hand() -> None:
    routes = np.array([[[0, 1]], [[1, 0]], [[2, 1]], [[2, 3]]], np.int16)
    pairs = routing.coactivation(routes, 4)
    assert pairs[0].tolist() == [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 2, 1], [0, 0, 1, 1]]
    lifts = routing.lift(pairs, 4)[0]
    assert lifts[0, 1] == pytest.approx(0.5 / (0.5 * 0.75))
    assert lifts[3, 2] == pytest.approx(0.25 / (0.25 * 0.5))
    assert lifts[0, 0] == lifts[0, 3] == 0


def hits_of(distances: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Share of uses an LRU cache with so many slots in each layer hits (Mattson)."""
    kept = [distances[:, : min(size, distances.shape[1] - 1)].sum() for size in sizes]
    return np.array(kept) / distances.sum()


def test_reuse_distance_by_hand() -> None:
    # a b c b a a: first, first, first, 1 other (c), 2 others (c, b), none
    found = routing.reuse_distances(sequence(0, 1, 2, 1, 0, 0), 4)
    assert found.tolist() == [[1, 1, 1, 0, 3]]
    assert hits_of(found, [0, 1, 2, 3, 4]).tolist() == pytest.approx(
        [0, 1 / 6, 2 / 6, 3 / 6, 3 / 6]
    )


def test_next_uses_by_hand() -> None:
    found = routing.next_uses(sequence(0, 1, 0), 2)
    assert found[:, 0].tolist() == [2, routing.NEVER, routing.NEVER]


def test_policies_by_hand() -> None:
    # Two slots. LRU: a b hit a, c drops b, b drops a, a drops c: one hit of six.
    turns = sequence(0, 1, 0, 2, 1, 0)
    assert hit_rates(turns, 3, [2], lru)[0] == pytest.approx(1 / 6)
    # LFU: a has two uses and stays when c and then b come: the last a hits too.
    assert hit_rates(turns, 3, [2], lfu)[0] == pytest.approx(2 / 6)
    # Knowing the future, c is not taken in at all: a, b and a hit.
    assert hit_rates(turns, 3, [2], belady)[0] == pytest.approx(3 / 6)
    for policy in POLICIES.values():
        assert hit_rates(turns, 3, [0, 3], policy).tolist() == pytest.approx([0, 3 / 6])


def test_layers_do_not_share_slots() -> None:
    routes = np.array([[[0], [1]], [[0], [2]], [[0], [1]]], np.int16)
    assert hit_rates(routes, 3, [1], lru)[0] == pytest.approx(2 / 6)


runs = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(runs)
def test_lru_is_what_the_distances_say(ids: list[int]) -> None:
    routes, sizes = sequence(*ids), range(6)
    distances = routing.reuse_distances(routes, 5)
    expected = hits_of(distances, sizes)
    assert distances.sum() == len(ids)
    np.testing.assert_allclose(hit_rates(routes, 5, [0, 1, 2, 3, 4, 5], lru), expected)


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=20), st.integers(1, 5))
def test_nobody_beats_the_clairvoyant(orders: list[list[int]], k: int) -> None:
    routes = np.array(orders, np.int16)[:, None, :k]
    sizes = list(range(6))
    best = hit_rates(routes, 5, sizes, belady)
    assert (np.diff(best) >= -1e-12).all()
    for policy in (lru, lfu):
        assert (hit_rates(routes, 5, sizes, policy) <= best + 1e-12).all()
    single = routes[:, :, :1]  # one layer, one expert a token: our policy has the same choices
    best = hit_rates(single, 5, sizes, belady)
    for size in sizes:
        assert routing.simulate(single, 5, size)[0].mean() <= best[size] + 1e-12


def best_possible(ids: list[int], slots: int) -> int:
    """The most hits of any policy that may leave a missed expert out, by trying all."""
    states = {frozenset(): 0}
    for expert in ids:
        following: dict[frozenset, int] = {}
        for held, hits in states.items():
            hits += expert in held
            pool = held | {expert}
            for kept in itertools.combinations(pool, min(slots, len(pool))):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), hits)
            following[held] = max(following.get(held, 0), hits)
        states = following
    return max(states.values())


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(0, 4))
def test_clairvoyant_is_the_optimum(ids: list[int], slots: int) -> None:
    found = hit_rates(sequence(*ids), 5, [slots], belady)[0] * len(ids)
    assert round(found) == best_possible(ids, slots)


def test_warm_start_gains_what_the_cold_one_lacks() -> None:
    # Always experts 0 and 1 in layer 0, and 2 and 3 in layer 1; exactly these slots.
    routes = np.tile(np.array([[[0, 1], [2, 3]]], np.int16), (40, 1, 1))
    found = routing.warm_gain(routes, 4, 4, first=2)
    assert (found.warm, found.first_warm) == (1.0, 1.0)
    assert found.cold == pytest.approx(19 / 20)
    assert found.first_cold == pytest.approx(1 / 2)
    assert found.promotions == pytest.approx(4 / 20)
    hits, promotions = routing.simulate(routes, 4, 4, limit=1)  # one copy a token
    assert hits.sum(axis=(1, 2))[:5].tolist() == [0, 1, 2, 3, 4]
    assert promotions == 4


def test_half_computed_tokens_are_left_out() -> None:
    routes = np.array([[[0], [1]], [[0], [-1]]], np.int16)
    trace = Trace("m", 2, (0, 1), routes, np.array([0]))
    assert routing.complete(trace).tolist() == [[[0], [1]]]


def test_cache_sizes() -> None:
    assert routing.cache_sizes(4) == [0, 1, 2, 3, 4]
    many = routing.cache_sizes(256)
    assert len(many) == 33
    assert (many[0], many[-1]) == (0, 256)
