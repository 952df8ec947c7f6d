"""Medians, quantiles, spreads and bootstrap confidence intervals of measured figures.

Pure functions of numbers; knows neither units nor what was measured. Every function has a case
worked by hand in its test.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import RequestError

Floats = NDArray[np.float64]

ROUNDS = 4000  # bootstrap resamples: the ends of an interval move by about 1 % of its width
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """Several runs of one figure. `q1` and `q3` are the quartiles, `least` and `most` the ends."""

    runs: int
    median: float
    q1: float
    q3: float
    least: float
    most: float

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        return self.q3 - self.q1

    def json(self) -> dict[str, float]:
        """For a report: the fields and the interquartile range."""
        return {**asdict(self), "iqr": self.iqr}


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float]:
        """For a report."""
        return asdict(self)


def _checked(values: Sequence[float]) -> Floats:
    array = np.asarray(values, np.float64)
    if not array.size or not np.isfinite(array).all():
        raise RequestError(f"a statistic needs finite figures, not {list(values)[:4]}")
    return array


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the figures lie, linear between neighbours (type 7 of
    Hyndman and Fan 1996, which NumPy and R use).
    """
    return float(np.quantile(_checked(values), share))


def summarise(values: Sequence[float]) -> Summary:
    """Median, quartiles and ends; RequestError for none or for what is not finite."""
    array = _checked(values)
    q1, median, q3 = (float(q) for q in np.quantile(array, [0.25, 0.5, 0.75]))
    return Summary(len(array), median, q1, q3, float(array.min()), float(array.max()))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th, 95th and 99th percentile and the largest of a distribution."""
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: quantile(values, share) for name, share in shares.items()}


def curve(values: Sequence[float], points: int = 101) -> list[float]:
    """The quantiles of `points` shares from 0 to 1, as many apart: a distribution to draw."""
    return [float(q) for q in np.quantile(_checked(values), np.linspace(0, 1, points))]


def gaps(times: Sequence[float]) -> list[float]:
    """Differences between neighbours, in the unit of the time stamps."""
    return [float(later - earlier) for earlier, later in pairwise(times)]


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = 0
) -> Interval:
    """Median of the ratios of runs that were made in turn; pairs are resampled together, so
    what changes slowly on the machine cancels. The interval is the percentile bootstrap's
    (Efron and Tibshirani 1993, chapter 13).
    """
    above, below = _checked(numerator), _checked(denominator)
    if len(above) != len(below) or (below == 0).any():
        raise RequestError("paired ratios need as many runs on both sides, none of them 0")
    ratios = above / below
    return _interval(float(np.median(ratios)), _medians(ratios, np.random.default_rng(seed)))


def _medians(sample: Floats, rng: np.random.Generator) -> Floats:
    drawn = rng.integers(0, len(sample), (ROUNDS, len(sample)))
    medians: Floats = np.median(sample[drawn], axis=1)
    return medians


def _interval(value: float, drawn: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn[np.isfinite(drawn)], [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def relative_error(predicted: float, measured: float) -> float:
    """(predicted - measured) / measured: 0.1 means predicted 10 % too high."""
    if measured == 0:
        raise RequestError("an error relative to 0 has no meaning")
    return (predicted - measured) / measured
