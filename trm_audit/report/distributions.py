"""Spreads: quantiles, histograms in the coarser bins that the page draws, both probabilities of the sampled tokens."""

from __future__ import annotations

import math

import numpy as np

from trm_audit.numerics.histogram import RELATIVE_ERROR, LogHistogram
from trm_audit.numerics.ragged import Bools, Ints
from trm_audit.report.blocks import Distribution, ProbabilityDensity
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.summary import Quantiles

PROBABILITY_EDGES = (
    *(0.0, 1e-6, 1e-5, 1e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
)
"""Finer where the probabilities of sampled tokens are and where the policies differ most: near 0 and near 1."""

_PER_OCTAVE = round(1 / RELATIVE_ERROR)
_HALF = 53  # bins below 2^k * 181/128, the edge nearest to 2^(k + 1/2) that the fine bins have
_BINS = len(PROBABILITY_EDGES) - 1
_LOG_EDGES = np.log(PROBABILITY_EDGES[1:-1])


def distribution(histogram: LogHistogram) -> Distribution:
    """The histogram of a quantity that is never negative, two bins to the octave, without the empty bins at its ends.

    Edges are 2^k and 2^k * 181/128, which fine bins have too, so that every count is exact; magnitudes outside 2^-60
    to 2^60 are in the outermost bins. No edges where no value is positive and finite.
    """
    fine = histogram.positive.reshape(-1, _PER_OCTAVE)
    counts = np.stack([fine[:, :_HALF].sum(axis=1), fine[:, _HALF:].sum(axis=1)], axis=1).ravel()
    filled = np.flatnonzero(counts)
    if not len(filled):
        return Distribution([], [], histogram.num_zero, histogram.num_inf)
    first, last = int(filled[0]), int(filled[-1])
    lowest = -len(fine) // 2  # octaves lie symmetrically about 2^0
    edges = [math.ldexp(1 + _HALF / _PER_OCTAVE * (at % 2), lowest + at // 2) for at in range(first, last + 2)]
    return Distribution(edges, counts[first : last + 1].tolist(), histogram.num_zero, histogram.num_inf)


def quantiles(histogram: LogHistogram) -> Quantiles:
    """The spread of a quantity; the histogram is not empty."""
    inner = {name: histogram.quantile(q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))}
    return Quantiles(n=histogram.count, min=histogram.min, max=histogram.max, mean=histogram.mean, **inner)


class ProbabilityTotals:
    """Sampled tokens by their probability under the rollout policy and under the trainer.

    Log-probabilities are compared with the logarithms of the edges: nothing is lost to rounding near 0 or 1, and one
    that rounding left slightly above 0 belongs to the last bin.
    """

    def __init__(self) -> None:
        self.counts: Ints = np.zeros((_BINS, _BINS), dtype=np.int64)

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add the policy tokens of a batch that have both log-probabilities, kept or not."""
        rollout, trainer = batch.aligned("rollout_logprobs"), batch.aligned("trainer_logprobs")
        if rollout is None or trainer is None:
            return
        known = ~(np.isnan(rollout) | np.isnan(trainer))
        if not known.all():
            rollout, trainer = rollout[known], trainer[known]
        cells = np.searchsorted(_LOG_EDGES, rollout) * _BINS + np.searchsorted(_LOG_EDGES, trainer)
        self.counts += np.bincount(cells, minlength=_BINS * _BINS).reshape(_BINS, _BINS)

    def __add__(self, other: ProbabilityTotals) -> ProbabilityTotals:
        merged = ProbabilityTotals()
        merged.counts = self.counts + other.counts
        return merged

    def finish(self) -> ProbabilityDensity | None:
        """Counts [rollout][trainer]; None where no token had both."""
        return ProbabilityDensity(list(PROBABILITY_EDGES), self.counts.tolist()) if self.counts.any() else None
