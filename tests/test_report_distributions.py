"""Coarser histograms keep every count, and tokens are where both of their probabilities put them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from trm_audit.numerics.histogram import LogHistogram
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.distributions import PROBABILITY_EDGES, ProbabilityTotals, distribution


def histogram_of(*values: float) -> LogHistogram:
    out = LogHistogram()
    out.add(np.array(values, dtype=np.float64))
    return out


def test_the_counts_are_those_of_the_values_between_the_edges() -> None:
    values = np.exp(np.random.default_rng(1).normal(-6, 4, 20_000))
    found = distribution(histogram_of(*values))
    assert found.counts == np.histogram(values, bins=found.edges)[0].tolist()
    assert sum(found.counts) == 20_000
    assert (found.num_zero, found.num_inf) == (0, 0)


def test_values_on_an_edge_belong_to_the_bin_above_it() -> None:
    found = distribution(histogram_of(1.0, 181 / 128, math.nextafter(181 / 128, 0), math.nextafter(2.0, 0), 2.0))
    assert found.edges == [1.0, 181 / 128, 2.0, 2 * 181 / 128]
    assert found.counts == [2, 2, 1]


def test_edges_are_powers_of_2_and_those_times_181_over_128_without_gaps() -> None:
    found = distribution(histogram_of(1e-9, 3e4))
    for low, high in zip(found.edges, found.edges[1:], strict=False):
        assert high / low == pytest.approx(math.sqrt(2), rel=2e-4)
    for edge in found.edges:
        assert math.frexp(edge)[0] in (0.5, 181 / 256)


def test_empty_bins_at_the_ends_are_left_out_and_those_between_stay() -> None:
    found = distribution(histogram_of(1e-3, 5.0))
    assert found.counts[0] == found.counts[-1] == 1
    assert sum(found.counts) == 2
    assert len(found.counts) > 20
    assert found.edges[0] <= 1e-3 < found.edges[1]
    assert found.edges[-2] <= 5.0 < found.edges[-1]


def test_zeros_and_infinities_are_counted_apart_and_nan_nowhere() -> None:
    found = distribution(histogram_of(0.0, 0.0, math.inf, 1.0, math.nan))
    assert (found.counts, found.num_zero, found.num_inf) == ([1], 2, 1)


def test_without_a_positive_number_there_are_no_bins() -> None:
    for values, zeros, infinities in (((), 0, 0), ((0.0,), 1, 0), ((math.inf, math.inf), 0, 2)):
        found = distribution(histogram_of(*values))
        assert (found.edges, found.counts) == ([], [])
        assert (found.num_zero, found.num_inf) == (zeros, infinities)


def test_magnitudes_beyond_the_histograms_range_are_in_its_outermost_bins() -> None:
    found = distribution(histogram_of(1e-300, 1e300))
    assert (found.edges[0], found.edges[-1]) == (2.0**-60, 2.0**60)
    assert (found.counts[0], found.counts[-1], sum(found.counts)) == (1, 1, 2)


def test_the_distribution_of_two_histograms_added_is_that_of_all_values() -> None:
    values = np.random.default_rng(2).lognormal(0, 3, 500)
    assert distribution(histogram_of(*values[:200]) + histogram_of(*values[200:])) == distribution(
        histogram_of(*values)
    )


def token_batch(rollout: list[list[float] | None], trainer: list[list[float] | None]) -> pa.RecordBatch:
    kind = pa.list_(pa.float64())
    return pa.RecordBatch.from_pydict(
        {"rollout_logprobs": pa.array(rollout, kind), "trainer_logprobs": pa.array(trainer, kind)}
    )


def totals_of(*batches: pa.RecordBatch) -> ProbabilityTotals:
    totals = ProbabilityTotals()
    for batch in batches:
        totals.add(ScoreBatch(batch), None)
    return totals


def bin_of(log_probability: float) -> int:
    """The bin edges[i] < p <= edges[i + 1], by a loop over logarithms."""
    inner = [math.log(edge) for edge in PROBABILITY_EDGES[1:-1]]
    return sum(log_probability > edge for edge in inner)


def random_lists(rng: np.random.Generator, rows: int = 30) -> tuple[list[list[float]], list[list[float]]]:
    rollout = [(-rng.exponential(2, int(n))).tolist() for n in rng.integers(0, 9, rows)]
    return rollout, [[min(v + float(rng.normal(0, 0.5)), 0.0) for v in row] for row in rollout]


def test_every_token_is_counted_in_the_bin_of_both_probabilities() -> None:
    rollout, trainer = random_lists(np.random.default_rng(3))
    expected = np.zeros((len(PROBABILITY_EDGES) - 1,) * 2, dtype=int)
    for row, other in zip(rollout, trainer, strict=True):
        for a, b in zip(row, other, strict=True):
            expected[bin_of(a), bin_of(b)] += 1
    found = totals_of(token_batch([*rollout], [*trainer])).finish()
    assert found is not None
    assert found.edges == list(PROBABILITY_EDGES)
    assert found.counts == expected.tolist()


@pytest.mark.parametrize(
    ("log_probability", "low"),
    [
        *((0.0, 0.99), (3e-7, 0.99), (math.log(0.995), 0.99), (math.log(0.99), 0.95), (math.log(0.7), 0.6)),
        *((math.log(1e-6), 0.0), (math.nextafter(math.log(1e-6), 0), 1e-6), (-800.0, 0.0), (-math.inf, 0.0)),
    ],
)
def test_a_bin_holds_its_upper_edge_and_the_last_one_what_rounding_left_above_1(
    log_probability: float, low: float
) -> None:
    found = totals_of(token_batch([[math.log(0.5)]], [[log_probability]])).finish()
    assert found is not None
    counts = np.array(found.counts)
    assert counts.sum() == 1
    assert counts[PROBABILITY_EDGES.index(0.4), PROBABILITY_EDGES.index(low)] == 1


def test_halves_added_and_batches_of_any_size_are_the_whole() -> None:
    rollout, trainer = random_lists(np.random.default_rng(4))
    batch = token_batch([*rollout], [*trainer])
    whole = totals_of(batch).finish()
    assert (totals_of(batch.slice(0, 7)) + totals_of(batch.slice(7))).finish() == whole
    assert totals_of(*(batch.slice(i, 1) for i in reversed(range(30)))).finish() == whole


def test_tokens_that_the_policy_did_not_sample_are_left_out() -> None:
    batch = token_batch([[-0.1, -5.0], [-0.1]], [[-0.1, -5.0], [-0.1]])
    masked = batch.append_column("response_mask", pa.array([[True, False], [False]]))
    found = totals_of(masked).finish()
    assert found == totals_of(token_batch([[-0.1]], [[-0.1]])).finish()


def test_rows_and_tokens_without_one_of_the_two_are_left_out() -> None:
    batch = token_batch([[-1.0], None, [-2.0, -3.0]], [None, [-1.0], [math.nan, -3.0]])
    assert totals_of(batch).finish() == totals_of(token_batch([[-3.0]], [[-3.0]])).finish()


@pytest.mark.parametrize("name", ["rollout_logprobs", "trainer_logprobs"])
def test_without_one_of_the_columns_there_is_no_density(name: str) -> None:
    batch = token_batch([[-1.0]], [[-1.0]])
    assert totals_of(batch.drop_columns([name])).finish() is None
    assert totals_of(batch.slice(0, 0)).finish() is None
    assert ProbabilityTotals().finish() is None
