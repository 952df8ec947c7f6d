"""Each statistic against a case worked by hand."""

import pytest

from greenroom.bench import statistics as st
from greenroom.errors import RequestError


def test_summary_of_five_runs() -> None:
    # sorted 1 2 4 8 16: quartiles at positions 1, 2, 3
    found = st.summarise([4, 1, 16, 2, 8])
    assert (found.runs, found.median, found.q1, found.q3) == (5, 4, 2, 8)
    assert (found.least, found.most, found.iqr) == (1, 16, 6)
    assert found.json()["iqr"] == 6


def test_quantiles_are_linear_between_neighbours() -> None:
    # positions 0 1 2 3; 0.25 * 3 = 0.75 of the way from 10 to 20
    assert st.quantile([10, 20, 30, 40], 0.25) == 17.5
    assert st.quantile([10, 20, 30, 40], 0.5) == 25
    assert st.quantile([7], 0.99) == 7


def test_percentiles_of_a_hundred_and_one() -> None:
    assert st.percentiles(list(range(101))) == {
        "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100,
    }  # fmt: skip


def test_a_curve_goes_from_the_least_to_the_most() -> None:
    # 1 2 4 at the shares 0, 1/2, 1; a quarter of the way in between: 1.5 and 3
    assert st.curve([4, 1, 2], 5) == [1, 1.5, 2, 3, 4]


def test_gaps() -> None:
    assert st.gaps([1.0, 1.5, 3.5]) == [0.5, 2.0]
    assert st.gaps([1.0]) == []


def test_a_constant_has_no_spread() -> None:
    assert st.paired_ratio([3, 3, 3], [2, 2, 2]) == st.Interval(1.5, 1.5, 1.5)


def test_two_values_give_the_binomial_interval() -> None:
    # Medians of two draws from {1, 3}: 1, 2 or 3 with probability 1/4, 1/2, 1/4; the 2.5th and
    # 97.5th percentiles are the ends.
    found = st.paired_ratio([1, 3], [1, 1])
    assert (found.value, found.low, found.high) == (2, 1, 3)


def test_pairs_cancel_what_drifts() -> None:
    # the machine slows down threefold; each pair has the ratio 2
    found = st.paired_ratio([2, 4, 6], [1, 2, 3])
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_relative_error() -> None:
    assert st.relative_error(110, 100) == pytest.approx(0.1)
    assert st.relative_error(80, 100) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: st.summarise([]),
        lambda: st.summarise([1.0, float("nan")]),
        lambda: st.paired_ratio([1, 2], [1]),
        lambda: st.paired_ratio([1], [0]),
        lambda: st.relative_error(1, 0),
    ],
)
def test_what_has_no_meaning_is_refused(wrong) -> None:
    with pytest.raises(RequestError):
        wrong()
