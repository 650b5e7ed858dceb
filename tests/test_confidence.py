"""Limits of shares and intervals of means agree with scipy and with first principles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trm_audit.numerics.confidence import clopper_pearson_upper, clustered_mean
from trm_audit.numerics.histogram import Moments


def moments(values: np.ndarray) -> Moments:
    out = Moments()
    out.add(values)
    return out


@pytest.mark.parametrize(("violations", "n"), [(0, 10), (1, 10), (3, 48), (9, 10), (10, 10), (0, 100_000)])
def test_clopper_pearson_agrees_with_scipys_exact_test(violations: int, n: int) -> None:
    interval = stats.binomtest(violations, n, alternative="less").proportion_ci(0.95, method="exact")
    assert clopper_pearson_upper(violations, n) == pytest.approx(interval.high, rel=1e-9)


def test_no_violation_among_n_gives_about_three_over_n() -> None:
    assert clopper_pearson_upper(0, 1000) == pytest.approx(3 / 1000, rel=5e-3)


def test_at_the_limit_so_few_violations_have_five_per_cent_probability() -> None:
    upper = clopper_pearson_upper(4, 70)
    assert stats.binom.cdf(4, 70, upper) == pytest.approx(0.05, rel=1e-9)


def test_no_observation_has_no_limit() -> None:
    assert math.isnan(clopper_pearson_upper(0, 0))


def test_without_clusters_the_interval_is_students() -> None:
    values = np.random.default_rng(0).exponential(1.0, 25)
    result = clustered_mean(np.zeros(0), np.zeros(0), moments(values))
    expected = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (result.low, result.high) == pytest.approx(expected, rel=1e-12)
    assert result.clusters == 25


def test_clusters_of_one_are_the_same_as_no_clusters() -> None:
    values = np.random.default_rng(1).exponential(1.0, 30)
    alone = clustered_mean(np.zeros(0), np.zeros(0), moments(values))
    single = clustered_mean(np.ones(12), values[:12], moments(values[12:]))
    assert (single.mean, single.low, single.high) == pytest.approx((alone.mean, alone.low, alone.high), rel=1e-12)


def test_copies_of_a_sequence_do_not_narrow_the_interval() -> None:
    # GIVEN 20 prompts, each sampled once, and the same 20 with eight identical rollouts each
    values = np.random.default_rng(2).normal(size=20)
    once = clustered_mean(np.ones(20), values, Moments())
    copied = clustered_mean(np.full(20, 8.0), 8 * values, Moments())
    # THEN nothing was learned from the copies
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), rel=1e-12)


def test_the_interval_covers_the_mean_of_dependent_rollouts_as_often_as_it_says() -> None:
    rng, covered, trials = np.random.default_rng(3), 0, 2000
    for _ in range(trials):
        prompts = rng.normal(0, 1, 30)
        sizes = np.full(30, 4.0)
        sums = 4 * prompts + rng.normal(0, 0.5, (30, 4)).sum(axis=1)
        result = clustered_mean(sizes, sums, Moments())
        covered += result.low <= 0 <= result.high
    # three standard errors of a share of 0.95 over 2000 trials
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_infinite_values_and_single_clusters_leave_no_interval() -> None:
    infinite = clustered_mean(np.ones(3), np.array([1.0, np.inf, 2.0]), Moments())
    assert infinite.mean == math.inf
    assert math.isnan(infinite.low)
    single = clustered_mean(np.array([4.0]), np.array([2.0]), Moments())
    assert (single.mean, single.clusters) == (0.5, 1)
    assert math.isnan(single.high)
