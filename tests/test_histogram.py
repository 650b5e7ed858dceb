"""Mergeable statistics agree with numpy on the whole data, whatever the order and the tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trm_audit.numerics.histogram import RELATIVE_ERROR, LogHistogram, Moments, PairCounts

QUANTILES = (0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def filled(values: np.ndarray) -> LogHistogram:
    histogram = LogHistogram()
    histogram.add(np.asarray(values, dtype=np.float64))
    return histogram


TAILS = {
    "lognormal": lambda rng: rng.lognormal(-7, 3, 200_000),
    "cauchy, both signs": lambda rng: rng.standard_cauchy(200_000),
    "pareto": lambda rng: rng.pareto(0.4, 200_000) + 1e-9,
    "half zeros": lambda rng: np.where(rng.random(100_001) < 0.5, 0.0, rng.exponential(1e-4, 100_001)),
    "few values": lambda rng: rng.normal(size=7),
}


@pytest.mark.parametrize("tail", TAILS)
def test_quantiles_of_long_tails_are_within_the_documented_error(tail: str) -> None:
    values = TAILS[tail](np.random.default_rng(1))
    histogram = filled(values)
    ordered = np.sort(values)
    for q in QUANTILES:
        rank = q * (len(values) - 1)
        scale = max(abs(ordered[math.floor(rank)]), abs(ordered[math.ceil(rank)]))
        assert abs(histogram.quantile(q) - np.quantile(values, q)) <= RELATIVE_ERROR * scale


@given(
    npst.arrays(
        np.float64,
        st.integers(1, 40),
        elements=st.floats(-1e15, 1e15, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-15),
    ),
    st.floats(0, 1),
)
def test_any_quantile_of_any_numbers_lies_within_one_bin_of_numpys(values: np.ndarray, q: float) -> None:
    ordered = np.sort(values)
    rank = q * (len(values) - 1)
    scale = max(abs(ordered[math.floor(rank)]), abs(ordered[math.ceil(rank)]))
    off = abs(filled(values).quantile(q) - np.quantile(values, q))
    assert off <= RELATIVE_ERROR * scale + 1e-12 * scale


def test_minimum_and_maximum_are_exact_and_the_mean_is_numpys() -> None:
    values = np.random.default_rng(2).lognormal(0, 2, 10_001)
    histogram = filled(values)
    assert (histogram.quantile(0), histogram.quantile(1)) == (values.min(), values.max())
    assert histogram.mean == pytest.approx(values.mean(), rel=1e-13)
    assert histogram.count == len(values)


def test_merging_in_any_order_gives_the_histogram_of_the_whole() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.standard_cauchy(5000), [0.0, np.inf, -np.inf, np.nan]])
    rng.shuffle(values)
    parts = [filled(part) for part in np.array_split(values, 7)]
    whole = filled(values)
    for order in (range(7), reversed(range(7)), (3, 1, 6, 0, 2, 5, 4)):
        merged = sum((parts[i] for i in order), LogHistogram())
        assert (merged.positive == whole.positive).all()
        assert (merged.negative == whole.negative).all()
        assert [merged.quantile(q) for q in QUANTILES] == [whole.quantile(q) for q in QUANTILES]


def test_infinities_sort_to_the_ends_and_nan_is_counted_apart() -> None:
    histogram = filled(np.array([np.inf, 1.0, -np.inf, np.nan, 2.0]))
    assert (histogram.count, histogram.num_nan, histogram.num_inf, histogram.num_negative_inf) == (4, 1, 1, 1)
    assert histogram.quantile(0) == -math.inf
    assert histogram.quantile(1) == math.inf
    assert histogram.quantile(0.5) == pytest.approx(1.5, rel=RELATIVE_ERROR)
    assert math.isnan(histogram.mean)
    assert filled(np.array([np.inf, 1.0])).mean == math.inf


def test_between_a_number_and_infinity_a_quantile_is_infinite() -> None:
    assert filled(np.array([1.0, np.inf])).quantile(0.5) == math.inf
    assert filled(np.array([-np.inf, 1.0])).quantile(0.5) == -math.inf


def test_nothing_has_no_quantile_and_no_mean() -> None:
    assert math.isnan(LogHistogram().quantile(0.5))
    assert math.isnan(filled(np.array([np.nan])).mean)


def test_magnitudes_outside_the_bins_stay_between_minimum_and_maximum() -> None:
    values = np.array([1e-300, 1e-200, 1e200, 1e250, 1e300])
    histogram = filled(values)
    assert histogram.quantile(0.25) <= 2**-60 * (1 + RELATIVE_ERROR)
    assert histogram.quantile(1) == 1e300


GRID = np.array([0.0, 0.001, 0.05, 0.05000000000000001, 1.0])


def test_pair_counts_equal_a_loop_at_every_pair_of_thresholds() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.exponential(0.05, 500), rng.exponential(0.01, 500)
    a[:3], b[2:5] = (np.inf, np.nan, 0.05), (0.001, np.nan, np.inf)
    one, two = PairCounts(GRID, GRID[1:]), PairCounts(GRID, GRID[1:])
    one.add(a[:200], b[:200])
    two.add(a[200:], b[200:])
    expected = [[sum(1 for x, y in zip(a, b, strict=True) if x <= i and y <= j) for j in GRID[1:]] for i in GRID]
    assert (two + one).at_most.tolist() == expected
    assert (one + two).cells.sum() == 500


def test_moments_of_parts_are_the_moments_of_the_whole() -> None:
    # a large offset would cost a sum of squares all its digits
    values = np.random.default_rng(7).normal(1e8, 1.0, 5000)
    merged = Moments()
    for part in np.array_split(values, 9):
        half = Moments()
        half.add(part)
        merged = half + merged
    assert merged.count == len(values)
    assert merged.mean == pytest.approx(values.mean(), rel=1e-14)
    assert merged.m2 == pytest.approx(((values - values.mean()) ** 2).sum(), rel=1e-6)


def test_an_infinite_value_makes_the_mean_infinite_and_leaves_no_spread() -> None:
    moments = Moments()
    moments.add(np.array([1.0, 2.0]))
    moments.add(np.array([np.inf]))
    moments.add(np.array([3.0]))
    assert moments.mean == math.inf
    assert math.isnan(moments.m2)
