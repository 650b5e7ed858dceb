"""Statistics that merge with `+` in any order: quantiles of long tails, acceptance counts, moments (numpy, float64).

Everything a report says about a million sequences has to come from one pass in bounded memory, and from shards read
in any order. So each accumulator here has `add(values)` for one batch and `+` for two shards; counts merge exactly,
sums up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from trm_audit.numerics.ragged import Floats, Ints

_MANTISSA_BITS = 7
_OCTAVES = (-60, 60)
_PER_OCTAVE = 1 << _MANTISSA_BITS
_NUM_BINS = (_OCTAVES[1] - _OCTAVES[0]) * _PER_OCTAVE

RELATIVE_ERROR = 1 / _PER_OCTAVE
"""Largest relative error of an order statistic read from a `LogHistogram`, for magnitudes of 2**-60 to 2**60."""


def _bins() -> Ints:
    return np.zeros(_NUM_BINS, dtype=np.int64)


@dataclass
class LogHistogram:
    """Counts over fixed logarithmic bins, 128 in each octave, of either sign.

    A bin is the exponent and the first 7 mantissa bits of the float64 itself: no logarithm is taken, edges are exact
    and the same on every machine. Magnitudes outside 2**-60 to 2**60 fall into the outermost bins. Zeros, infinities
    and NaN are counted apart; min and max are exact; the mean is that of a float64 sum.

    Worked instance: after add([0, 1, 2, inf]) quantile(0) is 0, quantile(0.5) is within 0.8 % of 1.5, quantile(1) and
    mean are inf.
    """

    positive: Ints = field(default_factory=_bins)
    negative: Ints = field(default_factory=_bins)
    num_zero: int = 0
    num_inf: int = 0
    num_negative_inf: int = 0
    num_nan: int = 0
    min: float = math.inf
    max: float = -math.inf
    total: float = 0.0

    def add(self, values: Floats) -> None:
        """Count `values` [n]; NaN only in `num_nan`."""
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        if not (low > 0 and high < math.inf):  # otherwise all are positive and finite: the usual case, and the fast one
            values = self._add_special(values)
            if not len(values):
                return
            low, high = float(values.min()), float(values.max())
        else:
            self.positive += _count(values)
        self.min, self.max = min(self.min, low), max(self.max, high)
        with np.errstate(invalid="ignore", over="ignore"):
            self.total = float(np.add(self.total, values.sum()))

    def _add_special(self, values: Floats) -> Floats:
        """Count values of every kind; returns those that are numbers."""
        number = values[~np.isnan(values)]
        self.num_nan += len(values) - len(number)
        finite = number[np.isfinite(number)]
        self.positive += _count(finite[finite > 0])
        self.negative += _count(-finite[finite < 0])
        self.num_zero += int(np.count_nonzero(finite == 0))
        self.num_inf += int(np.count_nonzero(number == np.inf))
        self.num_negative_inf += int(np.count_nonzero(number == -np.inf))
        return number

    def __add__(self, other: LogHistogram) -> LogHistogram:
        with np.errstate(invalid="ignore", over="ignore"):
            total = float(np.add(self.total, other.total))
        return LogHistogram(
            self.positive + other.positive,
            self.negative + other.negative,
            self.num_zero + other.num_zero,
            self.num_inf + other.num_inf,
            self.num_negative_inf + other.num_negative_inf,
            self.num_nan + other.num_nan,
            min(self.min, other.min),
            max(self.max, other.max),
            total,
        )

    @property
    def count(self) -> int:
        """How many numbers were added, infinities included, NaN not."""
        counted = int(self.positive.sum() + self.negative.sum())
        return counted + self.num_zero + self.num_inf + self.num_negative_inf

    @property
    def mean(self) -> float:
        """NaN of nothing, and where both infinities occur."""
        count = self.count
        return self.total / count if count else math.nan

    def quantile(self, q: float) -> float:
        """The q-quantile, linear between order statistics as numpy's default; NaN of nothing.

        Each order statistic is read from its bin to `RELATIVE_ERROR` (the first and the last are exact), so the
        result is off by at most that share of the larger of the two in magnitude. Below 2**-60 (9e-19) the error is
        absolute, that large.
        """
        count = self.count
        if not count:
            return math.nan
        rank = q * (count - 1)
        lower = self._order_statistic(math.floor(rank))
        part = rank - math.floor(rank)
        if part == 0:
            return lower
        upper = self._order_statistic(math.floor(rank) + 1)
        if math.isinf(lower) or math.isinf(upper):
            return lower if lower == -math.inf else upper
        return lower + (upper - lower) * part

    def _order_statistic(self, rank: int) -> float:
        """The value at position `rank` (from 0) of the sorted values."""
        counts = np.concatenate(
            [[self.num_negative_inf], self.negative[::-1], [self.num_zero], self.positive, [self.num_inf]]
        )
        below = np.cumsum(counts)
        if rank <= 0 or rank >= below[-1] - 1:
            return self.min if rank <= 0 else self.max
        cell = int(np.searchsorted(below, rank, side="right"))
        special = {0: -math.inf, _NUM_BINS + 1: 0.0, 2 * _NUM_BINS + 2: math.inf}
        if cell in special:
            return special[cell]
        within = (rank - (below[cell] - counts[cell]) + 0.5) / counts[cell]
        value = -_value(_NUM_BINS - cell, 1 - within) if cell <= _NUM_BINS else _value(cell - _NUM_BINS - 2, within)
        return min(max(value, self.min), self.max)


def _count(magnitudes: Floats) -> Ints:
    """Bin counts of positive finite numbers."""
    codes = np.ascontiguousarray(magnitudes).view(np.int64) >> (52 - _MANTISSA_BITS)
    codes -= (1023 + _OCTAVES[0]) << _MANTISSA_BITS
    return np.bincount(np.clip(codes, 0, _NUM_BINS - 1, out=codes), minlength=_NUM_BINS)


def _value(index: int, within: float) -> float:
    """The number at the share `within` of a bin."""
    octave, step = divmod(index, _PER_OCTAVE)
    return math.ldexp(1 + (step + within) / _PER_OCTAVE, _OCTAVES[0] + octave)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged by the rule of Chan, Golub and LeVeque (1979)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, values: Floats) -> None:
        """Add `values` [n]; an infinite one makes the mean infinite and `m2` NaN."""
        if len(values):
            with np.errstate(invalid="ignore"):
                mean = float(values.mean())
                merged = self + Moments(len(values), mean, float(np.square(values - mean).sum()))
            self.count, self.mean, self.m2 = merged.count, merged.mean, merged.m2

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        with np.errstate(invalid="ignore"):
            shift = other.mean - self.mean
            mean = self.mean + shift * other.count / count if math.isfinite(shift) else self.mean + other.mean
            return Moments(count, mean, self.m2 + other.m2 + shift * shift * self.count * other.count / count)


@dataclass
class PairCounts:
    """How many pairs (a, b) satisfy a <= grid_a[i] and b <= grid_b[j]: exact at every pair of thresholds."""

    grid_a: Floats
    grid_b: Floats
    cells: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.cells = np.zeros((len(self.grid_a) + 1, len(self.grid_b) + 1), dtype=np.int64)

    def add(self, a: Floats, b: Floats) -> None:
        """Count the pairs (a[k], b[k])."""
        rows = np.searchsorted(self.grid_a, a, side="left")
        columns = np.searchsorted(self.grid_b, b, side="left")
        flat = np.bincount(rows * self.cells.shape[1] + columns, minlength=self.cells.size)
        self.cells += flat.reshape(self.cells.shape)

    def __add__(self, other: PairCounts) -> PairCounts:
        merged = PairCounts(self.grid_a, self.grid_b)
        merged.cells = self.cells + other.cells
        return merged

    @property
    def at_most(self) -> Ints:
        """[a, b] how many pairs satisfy both thresholds."""
        both: Ints = np.cumsum(np.cumsum(self.cells, axis=0), axis=1)[:-1, :-1]
        return both
