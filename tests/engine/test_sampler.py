"""Sampling: the right distribution, exactly the right candidates, and nobody else's state."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from greenroom.engine.candidates import draw, log_sum_exp, top
from greenroom.engine.output import StopFilter
from greenroom.engine.params import SamplingParams
from greenroom.engine.sampler import Sampler
from greenroom.errors import GreenroomError, RequestError

VOCABULARY = 3000  # several groups and spans, and a rest


def row(seed: int = 0, size: int = VOCABULARY, scale: float = 3.0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).normal(0, scale, size)
    return values.astype(np.float32)


def softmax(values: np.ndarray[Any, Any], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    exact = values.astype(np.float64) / temperature
    weights = np.exp(exact - exact.max())
    return weights / weights.sum()


def plain_filter(
    logits: np.ndarray[Any, Any], temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray[Any, Any]:
    """The distribution by sorting everything: the plain twin of `draw`."""
    p = softmax(logits, temperature)
    order = np.argsort(-logits, kind="stable")
    keep = order[: top_k or len(order)]
    q = p[keep] / p[keep].sum()
    if top_p < 1:
        keep = keep[: int(np.searchsorted(np.cumsum(q), top_p, side="left")) + 1]
    keep = keep[p[keep] >= min_p * p.max()]
    result = np.zeros(len(logits))
    result[keep] = p[keep] / p[keep].sum()
    return result


def chi_square(observed: np.ndarray[Any, Any], p: np.ndarray[Any, Any]) -> tuple[float, int]:
    """Statistic and degrees of freedom, rare tokens pooled so that each cell expects 8."""
    n = observed.sum()
    order = np.argsort(-p)
    expected, seen = p[order] * n, observed[order]
    frequent = int((expected >= 8).sum())
    cells = np.append(expected[:frequent], expected[frequent:].sum())
    found = np.append(seen[:frequent], seen[frequent:].sum())
    used = cells > 0
    assert found[~used].sum() == 0, "a token without probability was drawn"
    return float(((found[used] - cells[used]) ** 2 / cells[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 0, 1.0, 0.0),
        (1.0, 40, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 0, 0.99, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.8, 50, 0.9, 0.02),
    ],
)
def test_draws_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = row(seed=int(temperature * 10) + top_k)
    expected = plain_filter(logits, temperature, top_k, top_p, min_p)
    source, counts = np.random.default_rng(1), np.zeros(VOCABULARY)
    for uniform in source.random(6000):
        counts[
            draw(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        ] += 1
    statistic, freedom = chi_square(counts, expected)
    # Wilson and Hilferty 1931: about normal after a cube root; 4 sigma
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@given(
    arrays(np.float32, st.integers(1, 2100), elements=st.floats(-9, 9, width=16)),
    st.integers(1, 2200),
)
@settings(max_examples=80, deadline=None)
def test_top_is_a_sorted_prefix(logits: np.ndarray[Any, Any], k: int) -> None:
    assert top(logits, k).tolist() == np.argsort(-logits, kind="stable")[:k].tolist()


@pytest.mark.parametrize("top_p", [0.0101, 0.3001, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 20.0])
def test_the_nucleus_is_the_one_sorting_finds(top_p: float, scale: float) -> None:
    logits = row(seed=4, scale=scale)
    expected = np.flatnonzero(plain_filter(logits, 1.0, 0, top_p, 0.0))
    drawn = {
        draw(logits, uniform, temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
        for uniform in np.linspace(0, 1 - 1e-9, 2_000)
    }
    assert drawn <= set(expected.tolist())
    missed = [token for token in expected if token not in drawn]
    assert softmax(logits)[missed].max(initial=0) <= top_p / 2_000 * 1.01  # rarer than draws


@pytest.mark.parametrize("k", [1, 5, 50, 700, VOCABULARY])
def test_forbidden_tokens_are_never_candidates(k: int) -> None:
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[3, 2999, 1500]] = [1, 2, 3]
    assert top(logits, k).tolist() == [1500, 2999, 3][:k]


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1, 0), (5, 1, 0), (0, 0.9, 0), (0, 1, 0.1)]
)
def test_the_ends_of_the_interval_draw_allowed_tokens(
    uniform: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[700, 2990]] = [0.1, 0.0]
    token = draw(logits, uniform, temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    assert token in (700, 2990)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = row()
    logits[[70, 2000]] = 99
    assert Sampler(SamplingParams(temperature=0), [1], VOCABULARY).sample(logits).token_id == 70


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = row()
    params = SamplingParams(temperature=0.3, top_k=3, logprobs=4, logit_bias={5: 50.0}, seed=1)
    sampled = Sampler(params, [1], VOCABULARY).sample(logits)
    exact = np.log(softmax(logits))
    assert sampled.token_id == 5
    assert sampled.logprob == pytest.approx(exact[5], abs=1e-5)
    assert [token for token, _ in sampled.top] == np.argsort(-exact)[:4].tolist()
    assert log_sum_exp(logits) == pytest.approx(np.log(np.exp(logits.astype(float)).sum()))


def test_penalties_follow_their_definitions() -> None:
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    logits = np.array([4.0, 3.0, -1.0, 2.9, 2.8], np.float32)
    sampler = Sampler(params, [2, 3], 5)
    changed = logits.copy()
    assert sampler.penalties is not None
    sampler.penalties.apply(changed)
    assert changed.tolist() == pytest.approx([4.0, 3.0, -2.0, 1.45, 2.8])
    # 0: 4 -> (4/2 - 0.5 - 0.25) = 1.25, then 1, then 4, then 3
    assert [sampler.sample(logits).token_id for _ in range(3)] == [0, 1, 4]
    changed = logits.copy()
    sampler.penalties.apply(changed)
    assert changed.tolist() == pytest.approx([1.25, 0.75, -2.0, 1.45, 0.65])
    assert logits.tolist() == pytest.approx([4.0, 3.0, -1.0, 2.9, 2.8])  # not changed


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="3000 tokens"):
        Sampler(SamplingParams(logit_bias={3000: 1.0}), [1], VOCABULARY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_reported(temperature: float) -> None:
    logits = row()
    logits[17] = np.nan
    with pytest.raises(GreenroomError, match="NaN"):
        Sampler(SamplingParams(temperature=temperature), [1], VOCABULARY).sample(logits)


def test_a_seed_decides() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [1], VOCABULARY)
        return [sampler.sample(row(i)).token_id for i in range(12)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_like_on_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    filter_ = StopFilter(stops)
    given_out, stopped, fed = "", False, ""
    for piece in pieces:
        fed += piece
        text, stopped = filter_.push(piece)
        given_out += text
        assert not any(stop in given_out for stop in stops)
        if stopped:
            break
    found = [at for stop in stops if (at := fed.find(stop)) >= 0]
    assert stopped == bool(found)
    if found:
        assert given_out == fed[: min(found)]
    else:
        assert given_out + filter_.flush() == fed
