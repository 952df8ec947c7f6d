"""The residency policy: hit rates on skewed, shifting and uniform routing."""

import numpy as np
import pytest

from greenroom.experts.residency import Move, Residency

LAYERS, EXPERTS, TOP_K = 4, 32, 4


def routes(steps, skew, seed, shift_at=None):
    """(steps, layers, top_k) ids drawn without replacement with Zipf-like popularity."""
    rng = np.random.default_rng(seed)
    popularity = (np.arange(EXPERTS) + 1.0) ** -skew
    ranks = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    noise = rng.gumbel(size=(steps, LAYERS, EXPERTS)) + np.log(popularity)
    chosen = np.argsort(-noise, -1)[..., :TOP_K]
    ids = np.take_along_axis(ranks[None].repeat(steps, 0), chosen, -1)
    if shift_at is not None:
        ids[shift_at:] = (ids[shift_at:] + EXPERTS // 2) % EXPERTS
    return ids


def replay(trace, slots, limit=4, **options):
    """(hit rate of the second half, promotions in it)."""
    residency = Residency(LAYERS, EXPERTS, slots, **options)
    hits = moves = 0
    for step, ids in enumerate(trace):
        counted = step >= len(trace) // 2
        hits += counted * (residency.slot_of[np.arange(LAYERS)[:, None], ids] >= 0).sum()
        residency.observe(ids)
        for move in residency.plan(limit):
            residency.apply(move)
            moves += counted
    return hits / (trace[len(trace) // 2 :].size), moves


def lru(trace, slots):
    held, hits = {}, 0
    for step, ids in enumerate(trace):
        for layer, row in enumerate(ids):
            for expert in row:
                hits += step >= len(trace) // 2 and (layer, expert) in held
                held.pop((layer, expert), None)
                held[layer, expert] = step
                if len(held) > slots:
                    del held[next(iter(held))]
    return hits / (trace[len(trace) // 2 :].size)


def test_beats_least_recently_used_on_skewed_routing():
    trace = routes(2000, skew=1.2, seed=0)
    ours, _ = replay(trace, slots=32)
    assert ours > lru(trace, 32) + 0.03


def test_follows_a_shift_of_popularity():
    trace = routes(4000, skew=1.5, seed=1, shift_at=1000)
    shifted, _ = replay(trace, slots=32)
    steady, _ = replay(routes(4000, skew=1.5, seed=1), slots=32)
    assert shifted > steady - 0.02


def test_uniform_routing_does_not_churn():
    trace = routes(2000, skew=0.0, seed=2)
    rate, moves = replay(trace, slots=64)
    assert rate == pytest.approx(0.5, abs=0.05)
    assert moves < 0.05 * trace[1000:].shape[0] * LAYERS


def test_a_slot_is_held_by_one_expert_only():
    residency = Residency(2, 4, 2)
    residency.apply(Move(0, 1, 0))
    assert residency.apply(Move(1, 3, 0)) == 1
    assert residency.slot_of[0, 1] == -1
    assert residency.slot_of[1, 3] == 0
    assert residency.resident == 1


def test_no_slots_no_plan():
    residency = Residency(2, 4, 0)
    residency.observe(np.zeros((2, 3), int))
    assert residency.plan(5) == []


def test_long_runs_keep_heat_finite():
    residency = Residency(1, 4, 1, half_life=1)
    for _ in range(2000):
        residency.observe(np.array([[1, 2]]))
    assert np.isfinite(residency.heat).all()
    assert residency.plan(1) == [Move(0, 1, 0)]


def talk(skew, seed, rows, slots=32, turns=4, prompt=512, answer=64):
    """Prompts, each followed by tokens one a step; of a prompt the last layer computes `rows`.

    Returns the hit rates (turns, layers) of the answers, and the promotions.
    """
    trace = routes(turns * (prompt + answer), skew, seed).reshape(turns, -1, LAYERS, TOP_K)
    residency = Residency(LAYERS, EXPERTS, slots)
    for slot in range(slots):
        residency.apply(Move(slot % LAYERS, slot // LAYERS, slot))
    hits, moves = np.zeros((turns, LAYERS)), 0
    for turn, tokens in enumerate(trace):
        first = tokens[:prompt].swapaxes(0, 1).copy()
        first[-1, : prompt - rows] = -1
        for ids in (first, *tokens[prompt:]):
            if ids is not first:
                found = residency.slot_of[np.arange(LAYERS)[:, None], ids] >= 0
                hits[turn] += found.mean(1) / answer
            residency.observe(ids)
            for move in residency.plan(1):
                residency.apply(move)
                moves += 1
    return hits, moves


def test_a_layer_that_computes_one_row_of_prompts_gets_its_slots_with_the_others():
    runs = range(10, 16)
    few, few_moves = zip(*(talk(0.8, seed, rows=1) for seed in runs), strict=True)
    all_, all_moves = zip(*(talk(0.8, seed, rows=512) for seed in runs), strict=True)
    few, all_ = np.mean(few, 0), np.mean(all_, 0)  # (turns, layers)
    assert (few[:, -1] > all_[:, -1] - 0.03).all()
    assert (few[:, :-1].mean(1) > all_[:, :-1].mean(1) - 0.01).all()
    assert sum(few_moves) < 1.2 * sum(all_moves)


def test_one_row_of_prompts_causes_no_churn_when_routing_is_uniform():
    few, all_ = (sum(talk(0.0, seed, rows)[1] for seed in range(6)) for rows in (1, 512))
    assert few <= all_


def test_heat_ages_by_steps():
    one, other = (Residency(1, 2, 1, half_life=8) for _ in range(2))
    for residency in (one, other):
        residency.observe_counts(np.array([[8, 0]]))
    one.age(23)
    for _ in range(23):
        other.observe_counts(np.array([[0, 0]]))
    for residency in (one, other):
        residency.observe_counts(np.array([[0, 1]]))
        np.testing.assert_allclose(residency.heat[0, 0] / residency.heat[0, 1], 8 / 2**3)


def test_unseen_routes_are_spread_by_hand():
    residency = Residency(2, 2, 1, half_life=1e9)
    residency.observe_counts(np.array([[3, 1], [1, 0]]))
    # two routes of the first layer agree with 10/16: a Beta(1.5, 1.5) prior for the second
    spread = [1 + 3 * 5 / 8, 3 * 3 / 8]
    np.testing.assert_allclose(residency.heat, [[3, 1], spread], rtol=1e-6)
    residency.observe_counts(np.array([[3, 1], [0, 4]]))
    spread = [1 + 3 * 5 / 16, 4 + 3 * 11 / 16]  # by all five routes now
    np.testing.assert_allclose(residency.heat, [[6, 2], spread], rtol=1e-6)


def test_a_layer_that_saw_nothing_is_taken_to_use_all_its_experts():
    residency = Residency(2, 2, 1)
    residency.observe_counts(np.array([[4, 0], [0, 0]]))
    np.testing.assert_allclose(residency.heat, [[4, 0], [2, 2]])
    residency.warm(np.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_allclose(residency.heat / residency.heat[0, 0], [[1, 2], [3, 4]])


def test_a_layer_that_computes_few_rows_of_prompts_keeps_its_slots():
    trace = routes(600, skew=1.2, seed=5)
    residency = Residency(LAYERS, EXPERTS, slots=32)
    for step, ids in enumerate(trace):
        counts = np.zeros((LAYERS, EXPERTS), int)
        prompt = trace[:100] if step % 100 == 0 else ids[None]
        for row in prompt[:-1]:
            counts[np.arange(LAYERS - 1)[:, None], row[:-1]] += 1
        counts[np.arange(LAYERS)[:, None], prompt[-1]] += 1
        residency.observe_counts(counts)
        for move in residency.plan(4):
            residency.apply(move)
    seated = (residency.slot_of >= 0).sum(1)
    assert seated.sum() == 32
    assert seated.min() >= 6  # of 8 on average


@pytest.mark.parametrize(("errors", "moves"), [(2.7, [Move(0, 1, 0)]), (2.8, [])])
def test_surely_hotter_by_hand(errors, moves):
    residency = Residency(1, 2, 1, half_life=1e9)
    residency.apply(Move(0, 0, 0))
    residency.observe_counts(np.array([[9, 25]]))  # they differ by 16, give or take 34 ** 0.5
    assert residency.plan(1, errors) == moves


@pytest.mark.parametrize(("errors", "moves"), [(3.4, [Move(1, 0, 2)]), (3.5, [])])
def test_what_follows_from_few_routes_is_less_sure(errors, moves):
    residency = Residency(2, 2, 3, half_life=1e9)
    for slot, place in enumerate([(0, 0), (0, 1), (1, 1)]):
        residency.apply(Move(*place, slot))
    residency.kept[0] = True
    residency.observe_counts(np.array([[180, 20], [18, 2]]))
    # 180 unseen routes at 18.5 and 2.5 of 21: they differ by 153, and every route seen is ten
    assert np.diff(residency.heat[1]) == pytest.approx(-153.1, abs=0.1)  # give or take 2000 ** 0.5
    assert residency.plan(1, errors) == moves
