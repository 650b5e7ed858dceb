"""Does a criterion reject the long ones? Acceptance by number of policy tokens, for max, mean and total.

The three are compared at thresholds that keep about the same share of all sequences, so that what differs is what
length does to each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trm_audit.numerics.histogram import PairCounts
from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.report.blocks import AcceptanceByLength, LengthCurve
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.deltas import KINDS, SAMPLED_DEFAULTS, decimals, given_thresholds
from trm_audit.report.summary import Thresholds
from trm_audit.report.totals import merged

LENGTH_DELTAS = decimals(-9, 6, step=5)
"""Thresholds at which sequences of each length are counted."""
LENGTHS = np.array([2.0**octave - 1 for octave in range(1, 25)])
"""Longest response of each bin."""
TYPICAL_ACCEPTANCE = 0.65
"""What the compared thresholds keep if none was given: far from 0 and 1, where all curves would be flat."""


@dataclass
class LengthTotals:
    """Sequences by number of policy tokens and by the statistics that criteria are on.

    Attributes:
        thresholds: the criteria's.
        counts: statistic -> pairs of num_tokens and value.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    counts: dict[str, PairCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._given = given_thresholds(self.thresholds)

    def add(self, batch: ScoreBatch, keep: Bools | None = None) -> None:
        """Add one batch; its verdicts do not matter here."""
        lengths = batch.filled("num_tokens")
        for name in (name for kind in KINDS for name in self._candidates(kind)):
            values = batch.filled(name)
            known = ~np.isnan(values) & (lengths >= 1)
            if known.any():
                self.counts.setdefault(name, self._empty(name)).add(lengths[known], values[known])

    def __add__(self, other: LengthTotals) -> LengthTotals:
        """Both have the same thresholds."""
        return LengthTotals(self.thresholds, merged(self.counts, other.counts))

    def finish(self) -> AcceptanceByLength | None:
        """Max, mean and total criterion by length; None where no sequence has a length and a statistic.

        The first has the threshold that was given, otherwise the one that keeps nearest to `TYPICAL_ACCEPTANCE`; the
        others have those that come nearest to what it keeps.
        """
        chosen = [name for kind in KINDS if (name := self._decisive(kind)) is not None]
        if not chosen:
            return None
        n = self.counts[chosen[0]].cells.sum(axis=1)
        bins = slice(int(np.flatnonzero(n)[0]), int(np.flatnonzero(n)[-1]) + 1)
        wanted, given, curves = TYPICAL_ACCEPTANCE, self._given.get(chosen[0]), []
        for name in chosen:
            at, kept = _nearest(self.counts[name], wanted, given)
            wanted, given = (kept, None) if name == chosen[0] else (wanted, None)
            curves.append(LengthCurve(name, float(self.counts[name].grid_b[at]), _shares(self.counts[name], at)[bins]))
        edges = [1 << octave for octave in range(bins.start, bins.stop + 1)]
        return AcceptanceByLength(edges, n[bins].tolist(), curves)

    def _empty(self, name: str) -> PairCounts:
        own = [self._given[name]] if name in self._given else []
        return PairCounts(LENGTHS, np.union1d(LENGTH_DELTAS, own))

    def _candidates(self, kind: str) -> list[str]:
        """The statistics that may stand for a kind of criterion: its own, kl, its estimate, the sampled default."""
        named = {"max": self.thresholds.max_of, "mean": self.thresholds.avg_of, "sum": self.thresholds.total_of}[kind]
        return [f"seq_{kind}_{d}" for d in dict.fromkeys((named, "kl", "kl_estimate", SAMPLED_DEFAULTS[kind])) if d]

    def _decisive(self, kind: str) -> str | None:
        """The candidate that most sequences have, the first of equals; None where the data have none."""
        found = [name for name in self._candidates(kind) if name in self.counts]
        return max(found, key=lambda name: int(self.counts[name].cells.sum()), default=None)


def _nearest(counts: PairCounts, wanted: float, given: float | None) -> tuple[int, float]:
    """Index of the given threshold, or of the one that keeps nearest to `wanted`; and the share that it keeps."""
    shares: Floats = np.cumsum(counts.cells.sum(axis=0))[:-1] / counts.cells.sum()
    at = int(np.argmin(np.abs(shares - wanted)) if given is None else np.searchsorted(counts.grid_b, given))
    return at, float(shares[at])


def _shares(counts: PairCounts, at: int) -> list[float | None]:
    """Share of each length that threshold `at` keeps."""
    kept, n = counts.cells[:, : at + 1].sum(axis=1), counts.cells.sum(axis=1)
    return [int(k) / int(of) if of else None for k, of in zip(kept, n, strict=True)]
