"""Percentile bootstrap of functions of sums, over clusters that are drawn whole (numpy, float64).

Rollouts of one prompt are dependent, so what is drawn again is the cluster: of c clusters c with replacement. A
statistic that is a function of sums (a mean, a ratio of means, an effective sample size) needs nothing but each
cluster's sums, whatever the number of tokens behind them.

With few clusters a percentile interval is too narrow, and of a long-tailed quantity more so: read it with the number
of clusters beside it. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from trm_audit.numerics.ragged import Floats, Ints

Statistics = Callable[[Floats], Mapping[str, Floats]]
"""Sums [n, m] -> name -> [n]; sums twice as large have to give the same (means and ratios do, totals do not)."""
Intervals = dict[str, tuple[float, float]]
"""Name -> (low, high), NaN where there is no interval."""

MAX_UNITS = 4096
"""More clusters than these are merged first, whole ones with whole ones: what is drawn stays independent, and the width
is estimated to about 1 % (1 / sqrt(2 * 4096))."""

_TAILS = (0.025, 0.975)
_BLOCK = 256  # draws at a time: at most 256 x 4096 indices and as many counts, 25 MB


def cluster_bootstrap(sums: Floats, statistics: Statistics, draws: int = 1000, seed: int = 0) -> Intervals:
    """95 % percentile intervals of statistics of the sums over independent clusters.

    Args:
        sums: [c, m] sums of each cluster.
        statistics: called with [n, m], each row the sums over the clusters of one draw.
        draws: how often the clusters are drawn.
        seed: with the same clusters in the same order the same seed gives the same intervals.

    NaN where there are fewer than two clusters or where the statistic is not finite in every draw.
    """
    if len(sums) < 2:
        return _no_intervals(statistics, sums)
    units = _merge(sums)
    drawn = [_evaluate(statistics, counts, units) for counts in _resamples(len(units), draws, seed)]
    return _intervals(drawn)


def bootstrap_difference(
    a_keys: Ints,
    a_sums: Floats,
    b_keys: Ints,
    b_sums: Floats,
    statistics: Statistics,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[Intervals, bool]:
    """95 % percentile intervals of statistics(b) - statistics(a), paired where both sides hold the same clusters.

    Args:
        a_keys, b_keys: [c] the clusters of each side, distinct.
        a_sums, b_sums: [c, m] their sums.
        statistics, draws, seed: as in `cluster_bootstrap`.

    Returns:
        The intervals, and whether they are paired: at least half of all keys occur on both sides. Then one draw takes
        the same clusters of both, with zeros where a side lacks one; otherwise each side is drawn for itself. Pairing
        clusters that have nothing but the key in common does no harm, as they do not covary.

    NaN where a side has fewer than two clusters or where the difference is not finite in every draw.
    """
    union = np.union1d(a_keys, b_keys)
    paired = len(union) > 0 and 2 * len(np.intersect1d(a_keys, b_keys)) >= len(union)
    if min(len(a_keys), len(b_keys)) < 2:
        return _no_intervals(statistics, a_sums), paired
    of_a, of_b = np.random.SeedSequence(seed).spawn(2)
    if paired:
        a_sums, b_sums, of_b = _at(union, a_keys, a_sums), _at(union, b_keys, b_sums), of_a
    a_units, b_units = _merge(a_sums), _merge(b_sums)
    resamples = zip(
        _resamples(len(a_units), draws, of_a), _resamples(len(b_units), draws, of_b), strict=True
    )  # paired, both streams are the same one
    drawn = []
    for a_counts, b_counts in resamples:
        a, b = _evaluate(statistics, a_counts, a_units), _evaluate(statistics, b_counts, b_units)
        with np.errstate(invalid="ignore"):
            drawn.append({name: b[name] - a[name] for name in a})
    return _intervals(drawn), paired


def _resamples(units: int, draws: int, seed: int | np.random.SeedSequence) -> Iterator[Floats]:
    """Blocks [n, units] of how often each was drawn: `draws` rows in all, each summing to `units`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for done in range(0, draws, _BLOCK):
        n = min(_BLOCK, draws - done)
        cells = generator.integers(0, units, size=(n, units)) + np.arange(n)[:, None] * units
        yield np.bincount(cells.ravel(), minlength=n * units).reshape(n, units).astype(np.float64)


def _evaluate(statistics: Statistics, counts: Floats, units: Floats) -> dict[str, Floats]:
    """Statistics of the sums over each draw; an infinite sum makes them infinite or, not drawn (0 x inf), NaN."""
    with np.errstate(all="ignore"):
        return dict(statistics(counts @ units))


def _merge(sums: Floats) -> Floats:
    """[at most MAX_UNITS, m] the clusters, several in one where there are more, as many in each as evenly possible."""
    if len(sums) <= MAX_UNITS:
        return sums
    units = len(sums) // math.ceil(len(sums) / MAX_UNITS)
    starts = np.arange(units) * len(sums) // units
    with np.errstate(invalid="ignore"):  # inf - inf
        out: Floats = np.add.reduceat(sums, starts, axis=0)
    return out


def _at(union: Ints, keys: Ints, sums: Floats) -> Floats:
    """[len(union), m] the sums where their keys stand in `union`, 0 elsewhere."""
    out = np.zeros((len(union), sums.shape[1]))
    out[np.searchsorted(union, keys)] = sums
    return out


def _intervals(blocks: list[dict[str, Floats]]) -> Intervals:
    out = {}
    for name in blocks[0]:
        values = np.concatenate([block[name] for block in blocks])
        if np.isfinite(values).all():
            low, high = np.quantile(values, _TAILS)
            out[name] = (float(low), float(high))
        else:
            out[name] = (math.nan, math.nan)
    return out


def _no_intervals(statistics: Statistics, sums: Floats) -> Intervals:
    names = _evaluate(statistics, np.zeros((1, len(sums))), sums)
    return dict.fromkeys(names, (math.nan, math.nan))
