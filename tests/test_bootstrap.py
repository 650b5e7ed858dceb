"""Bootstrap intervals agree with scipy and the cluster-robust interval, and cover the truth as often as they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trm_audit.numerics import bootstrap
from trm_audit.numerics.bootstrap import MAX_UNITS, bootstrap_difference, cluster_bootstrap
from trm_audit.numerics.confidence import clustered_mean
from trm_audit.numerics.histogram import Moments
from trm_audit.numerics.ragged import Floats


def ratio(sums: Floats) -> dict[str, Floats]:
    """Mean of what stands in column 0, counted in column 1."""
    return {"mean": sums[..., 0] / sums[..., 1]}


def clusters(rng: np.random.Generator, count: int, center: float = 1.0) -> Floats:
    """[count, 2] sums and sizes: values normal about their cluster's own mean, clusters of 1 to 8 values."""
    sizes = rng.integers(1, 9, count)
    own = rng.normal(center, 0.5, count)
    return np.stack([sizes * own + np.sqrt(sizes) * rng.normal(0, 0.3, count), sizes.astype(float)], axis=1)


def robust_interval(sums: Floats) -> tuple[float, float]:
    found = clustered_mean(sums[:, 1], sums[:, 0], Moments())
    return found.low, found.high


def test_the_interval_of_a_mean_is_that_of_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).lognormal(0, 1, 40)
    sums = np.stack([values, np.ones(40)], axis=1)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = cluster_bootstrap(sums, ratio, draws=20_000)["mean"]
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.02 * width)
    assert high == pytest.approx(expected.high, abs=0.02 * width)


@pytest.mark.parametrize("count", [300, 4096, 4097, 30_000])
def test_with_many_clusters_the_interval_is_the_cluster_robust_one(count: int) -> None:
    # GIVEN clusters of unequal size, up to more than are drawn one by one
    sums = clusters(np.random.default_rng(count), count)
    # THEN 4000 draws give the width of the cluster-robust interval within 6 % (a standard error is about 2 %)
    low, high = cluster_bootstrap(sums, ratio, draws=4000)["mean"]
    expected_low, expected_high = robust_interval(sums)
    assert high - low == pytest.approx(expected_high - expected_low, rel=0.06)
    assert (low + high) / 2 == pytest.approx((expected_low + expected_high) / 2, abs=0.06 * (high - low))


def test_95_per_cent_of_the_intervals_contain_the_truth() -> None:
    # GIVEN 300 data sets of 80 clusters whose mean is 1 (sizes and values are independent, so the ratio's is, too)
    rng = np.random.default_rng(3)
    intervals = [cluster_bootstrap(clusters(rng, 80), ratio, draws=400, seed=i)["mean"] for i in range(300)]
    covered = sum(low <= 1 <= high for low, high in intervals)
    # THEN the number of hits is one that 300 draws with a probability of 0.95 give, at three standard errors
    assert abs(covered - 285) <= 3 * math.sqrt(300 * 0.95 * 0.05)


def test_every_draw_takes_as_many_clusters_as_there_are_each_equally_often() -> None:
    counts = np.concatenate(list(bootstrap._resamples(50, 1000, seed=4)))
    assert counts.shape == (1000, 50)
    assert (counts.sum(axis=1) == 50).all()
    # THEN the counts are multinomial: mean 1 and variance 1 - 1/50 each, at five standard errors
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 * math.sqrt(0.98 / 1000)
    assert counts.var() == pytest.approx(0.98, abs=0.03)


def test_blocks_of_draws_are_independent_of_each_other() -> None:
    counts = np.concatenate(list(bootstrap._resamples(50, 1000, seed=4)))
    assert len(np.unique(counts, axis=0)) == 1000


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    sums = clusters(np.random.default_rng(5), 30)
    assert cluster_bootstrap(sums, ratio, seed=1) == cluster_bootstrap(sums, ratio, seed=1)
    assert cluster_bootstrap(sums, ratio, seed=1) != cluster_bootstrap(sums, ratio, seed=2)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_clusters_have_no_interval(count: int) -> None:
    low, high = cluster_bootstrap(np.ones((count, 2)), ratio)["mean"]
    assert math.isnan(low)
    assert math.isnan(high)


def test_an_infinite_sum_takes_the_interval_of_its_statistic_only() -> None:
    # GIVEN one infinite cluster, which some draws leave out, in one column of three
    sums = np.column_stack([clusters(np.random.default_rng(6), 20), np.ones(20)])
    sums[7, 2] = np.inf
    found = cluster_bootstrap(sums, lambda s: ratio(s) | {"other": s[..., 2] / s[..., 1]})
    assert math.isnan(found["other"][0])
    assert math.isnan(found["other"][1])
    assert found["mean"] == cluster_bootstrap(sums[:, :2], ratio)["mean"]


def test_a_statistic_that_some_draws_do_not_have_gets_no_interval() -> None:
    # GIVEN only one of ten clusters with a count: a draw without it is 0/0
    sums = np.zeros((10, 2))
    sums[3] = [2, 4]
    assert math.isnan(cluster_bootstrap(sums, ratio)["mean"][0])


def test_more_clusters_than_the_limit_are_merged_whole_and_evenly() -> None:
    sums = np.random.default_rng(7).random((2 * MAX_UNITS + 1000, 3))
    merged = bootstrap._merge(sums)
    assert len(merged) <= MAX_UNITS
    np.testing.assert_allclose(merged.sum(axis=0), sums.sum(axis=0), rtol=1e-12)
    sizes = bootstrap._merge(np.ones((2 * MAX_UNITS + 1000, 1)))[:, 0]
    assert sizes.max() - sizes.min() <= 1


def test_the_difference_of_data_with_themselves_is_exactly_0() -> None:
    sums = clusters(np.random.default_rng(8), 40)
    keys = np.arange(40)
    assert bootstrap_difference(keys, sums, keys, sums, ratio) == ({"mean": (0.0, 0.0)}, True)


def test_a_paired_difference_is_the_bootstrap_of_both_columns_drawn_together() -> None:
    rng = np.random.default_rng(9)
    a, noise = clusters(rng, 60), rng.normal(0.2, 0.1, 60)
    b = a + np.stack([noise * a[:, 1], np.zeros(60)], axis=1)
    keys = np.arange(60)
    found, paired = bootstrap_difference(keys, a, keys, b, ratio, draws=8000)
    together = cluster_bootstrap(
        np.hstack([a, b]), lambda s: {"d": s[..., 2] / s[..., 3] - s[..., 0] / s[..., 1]}, draws=8000, seed=10
    )["d"]
    assert paired
    assert found["mean"] == pytest.approx(together, abs=0.05 * (together[1] - together[0]))
    # AND far narrower than without the pairing
    alone, paired = bootstrap_difference(keys, a, keys + 100, b, ratio, draws=8000)
    assert not paired
    assert alone["mean"][1] - alone["mean"][0] > 5 * (together[1] - together[0])


def test_the_difference_of_unrelated_data_has_the_variance_of_both() -> None:
    rng = np.random.default_rng(11)
    a, b = clusters(rng, 500), clusters(rng, 300, center=1.5)
    found, paired = bootstrap_difference(np.arange(500), a, np.arange(1000, 1300), b, ratio, draws=4000)
    assert not paired
    widths = [high - low for low, high in (robust_interval(a), robust_interval(b))]
    low, high = found["mean"]
    assert high - low == pytest.approx(math.hypot(*widths), rel=0.06)
    assert (low + high) / 2 == pytest.approx(b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum(), abs=0.005)


def test_the_order_of_the_clusters_of_a_side_does_not_matter_when_paired() -> None:
    rng = np.random.default_rng(12)
    a, b, keys = clusters(rng, 50), clusters(rng, 50), rng.permutation(1000)[:50]
    mixed = rng.permutation(50)
    expected = bootstrap_difference(keys, a, keys, b, ratio)
    assert bootstrap_difference(keys, a, keys[mixed], b[mixed], ratio) == expected


@pytest.mark.parametrize(("shared", "expected"), [(0, False), (33, False), (34, True), (50, True)])
def test_paired_means_that_half_of_all_keys_are_on_both_sides(shared: int, expected: bool) -> None:
    # GIVEN 50 clusters a side, so that 100 - shared keys occur
    sums = clusters(np.random.default_rng(13), 50)
    _, paired = bootstrap_difference(np.arange(50), sums, np.arange(50) + 50 - shared, sums, ratio, draws=10)
    assert paired is expected


def test_a_cluster_that_one_side_lacks_counts_there_as_nothing() -> None:
    rng = np.random.default_rng(14)
    sums = clusters(rng, 40)
    # GIVEN b without the last five clusters, once left out and once written as zeros
    zeros = np.vstack([sums[:35], np.zeros((5, 2))])
    keys = np.arange(40)
    left_out = bootstrap_difference(keys, sums, keys[:35], sums[:35], ratio)
    assert left_out == bootstrap_difference(keys, sums, keys, zeros, ratio)


def test_many_paired_clusters_are_merged_with_their_partners() -> None:
    sums = clusters(np.random.default_rng(15), MAX_UNITS + 500)
    keys = np.arange(len(sums))
    shifted = sums + np.stack([0.25 * sums[:, 1], np.zeros(len(sums))], axis=1)
    found, paired = bootstrap_difference(keys, sums, keys, shifted, ratio, draws=100)
    assert paired
    assert found["mean"] == pytest.approx((0.25, 0.25), abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 5), (5, 1), (1, 1)])
def test_a_side_with_fewer_than_two_clusters_leaves_no_difference(a: int, b: int) -> None:
    found, _ = bootstrap_difference(np.arange(a), np.ones((a, 2)), np.arange(b), np.ones((b, 2)), ratio)
    assert math.isnan(found["mean"][0])


def test_an_infinite_difference_has_no_interval() -> None:
    sums = clusters(np.random.default_rng(16), 20)
    broken = sums.copy()
    broken[:, 0] = np.inf
    keys = np.arange(20)
    found, _ = bootstrap_difference(keys, broken, keys, broken, ratio)
    assert math.isnan(found["mean"][0])
