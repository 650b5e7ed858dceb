"""Reductions over sequences of different lengths, kept as `values` and `offsets` as in Arrow lists (numpy, float64).

Sequence i is `values[offsets[i]:offsets[i + 1]]`. Empty sequences have equal offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one flat array.

    Attributes:
        values: [n] entries of all sequences, one after another.
        offsets: [rows + 1] int64, where each sequence starts and, last, where the last one ends; `offsets[0]` is 0.

    Worked instance: [[5, 6], [], [7]] is values [5, 6, 7], offsets [0, 2, 2, 3].
    """

    values: NDArray[np.generic]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.generic]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Ints:
        """[rows] number of entries of each sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class SequenceStatistics:
    """Max, where it stands, mean and sum of one quantity per sequence. NaN (-1 for `argmax`) where no entry counts.

    Attributes:
        max, mean, sum: [rows] float64.
        argmax: [rows] int64, position within the sequence of the first maximum.
    """

    max: Floats
    mean: Floats
    sum: Floats
    argmax: Ints


def sequence_statistics(values: NDArray[np.generic], offsets: Ints, mask: Bools) -> SequenceStatistics:
    """Max, argmax, mean and sum per sequence over the entries where `mask` holds.

    Args:
        values: [n] entries, NaN not allowed where `mask` holds (inf is); sums are float64.
        offsets: [rows + 1].
        mask: [n]; entries outside are not looked at.

    Zero entries give NaN, not 0: the mean or the maximum of nothing is not a number.
    """
    rows = len(offsets) - 1
    count = segment_sum(mask.astype(np.float64), offsets)
    kept = np.where(mask, values.astype(np.float64), 0.0)
    total = segment_sum(kept, offsets)
    empty = count == 0
    total[empty] = np.nan
    with np.errstate(invalid="ignore"):
        mean = total / count
    entries = np.where(mask, values.astype(np.float64), -np.inf)
    peak = np.full(rows, np.nan)
    argmax = np.full(rows, -1, dtype=np.int64)
    filled = np.flatnonzero(~empty)
    if len(filled):
        starts = offsets[:-1][np.diff(offsets) > 0]
        peaks = np.maximum.reduceat(entries, starts)
        owner = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(entries))))
        at_peak = np.where(mask & (entries == peaks[owner]), np.arange(len(entries)), len(entries))
        first = np.minimum.reduceat(at_peak, starts)
        some = ~empty[np.diff(offsets) > 0]
        peak[filled] = peaks[some]
        argmax[filled] = first[some] - starts[some]
    return SequenceStatistics(max=peak, mean=mean, sum=total, argmax=argmax)


def segment_sum(values: Floats, offsets: Ints) -> Floats:
    """Sum of each sequence, [rows] float64; 0 for an empty one. inf in one sequence does not reach its neighbours."""
    out = np.zeros(len(offsets) - 1)
    filled = np.diff(offsets) > 0
    if filled.any():
        with np.errstate(invalid="ignore"):  # inf - inf in one sequence is NaN there
            out[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return out
