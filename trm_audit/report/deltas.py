"""Which delta? What every threshold on a statistic of the sequences would keep, from one pass.

Thresholds are short decimals, so that the figure that is printed is the figure that was counted: whoever types it
keeps exactly the share that the report says. Counts are of sequences with `value <= delta`, as filtering compares;
sequences without policy tokens count among all and are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from trm_audit.errors import UsageError
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.blocks import DeltaRow, DeltaTable, Target
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.summary import AcceptanceCurves, Curve, Thresholds
from trm_audit.report.totals import merged
from trm_audit.rollout import EXACT_DIVERGENCES, INTERVAL_DIVERGENCES, SKETCH_ESTIMATES


def decimals(first: int, last: int, step: int = 1) -> Floats:
    """Decimals of at most four digits from 10**first to below 10**last, ascending.

    Neighbours are at most 0.5 % apart with step 1, 2.5 % with step 5.
    """
    mantissas = [*range(1000, 2000, 5 * step), *range(2000, 5000, 10 * step), *range(5000, 10000, 20 * step)]
    return np.array([float(f"{m}e{e - 3}") for e in range(first, last) for m in mantissas])


DELTAS = np.array([float(f"{m}e{e}") for e in range(-6, 4) for m in (1, 1.5, 2, 3, 5, 7)] + [1e4])
"""Thresholds of the acceptance curves."""
ROUND_DELTAS = np.array([float(f"{m}e{e}") for e in range(-6, 4) for m in (1, 2, 5)] + [1e4])
"""Those that a table shows, as far as acceptance moves there."""
FINE_DELTAS = np.concatenate([[0.0], decimals(-18, 18), [float(f"1e{e}") for e in range(18, 309)]])
"""Those of the targets: 0, then to 0.5 % between 1e-18 and 1e18, then powers of ten."""
KINDS = ("max", "mean", "sum")
PAPER = {"max": 0.05, "mean": 0.001}
"""Thresholds of arXiv 2512.23075."""
_KL = ("kl", "kl_estimate", "kl_lower", "kl_upper")
_TV = ("tv", "tv_lower", "tv_upper")
MARKED = {
    **{f"seq_max_{d}": [PAPER["max"]] for d in (*_KL, "k2", "abs_log_ratio")},
    **{f"seq_mean_{d}": [PAPER["mean"]] for d in (*_KL, "k3")},
}
"""The same by the statistics that they are meant for (abs_log_ratio in the paper's first version)."""
MOST_ROWS = 14
SAMPLED_DEFAULTS = {"max": "k2", "mean": "k3", "sum": "k3"}
"""The D of a criterion that names none, where there is no kl."""

_DIVERGENCES = (*EXACT_DIVERGENCES, *SKETCH_ESTIMATES, *INTERVAL_DIVERGENCES, "k2", "k3", "abs_log_ratio")
_STATISTICS = tuple(f"seq_{kind}_{divergence}" for divergence in _DIVERGENCES for kind in KINDS)
_TABLED = {f"seq_{kind}_{d}" for kind in KINDS for d in (*_KL, "k2", "k3", "abs_log_ratio")}
_TABLED |= {f"seq_max_{d}" for d in _TV}
_TOKENS, _REWARDED, _CORRECT, _REWARD = range(4)


@dataclass
class WeightedCounts:
    """How many values are at most each threshold of a grid: exact, equality kept; and what belongs to those values.

    Attributes:
        grid: [g] thresholds, ascending.
        fine: [f] more thresholds, at which values are only counted; `grid` is among them.
        cells: [f + 1] values by the first of `fine` that is not below them; last, those above all.
        weights: [g + 1, 4] policy tokens, sequences with a reward, sequences with a reward above 0 and sum of rewards,
            by the first of `grid`.
    """

    grid: Floats
    fine: Floats
    cells: Ints = field(init=False)
    weights: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.cells = np.zeros(len(self.fine) + 1, dtype=np.int64)
        self.weights = np.zeros((len(self.grid) + 1, 4))

    def add(self, values: Floats, weights: Floats) -> None:
        """Add `values` [n], none of them NaN, to which `weights` [4, n] belong."""
        np.add.at(self.cells, np.searchsorted(self.fine, values, side="left"), 1)
        found = np.searchsorted(self.grid, values, side="left")
        with np.errstate(invalid="ignore"):
            for at, weight in enumerate(weights):
                self.weights[:, at] += np.bincount(found, weights=weight, minlength=len(self.weights))

    def __add__(self, other: WeightedCounts) -> WeightedCounts:
        merged = WeightedCounts(self.grid, self.fine)
        with np.errstate(invalid="ignore"):
            merged.cells, merged.weights = self.cells + other.cells, self.weights + other.weights
        return merged

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self.cells.sum())

    def at_most(self, deltas: Floats) -> Ints:
        """[d] how many values are <= deltas[i], each of which is one of `fine`."""
        counts: Ints = np.cumsum(self.cells)[np.searchsorted(self.fine, deltas)]
        return counts


@dataclass
class DeltaTotals:
    """Sequences, their policy tokens and rewards by the statistics that thresholds are on.

    Attributes:
        thresholds: the criteria's; each is a threshold of the statistic that it is on.
        counts: statistic -> sequences, policy tokens and rewards by threshold.
        num_empty: sequences without policy tokens.
        empty: [4] what belongs to them.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    counts: dict[str, WeightedCounts] = field(default_factory=dict)
    num_empty: int = 0
    empty: Floats = field(default_factory=lambda: np.zeros(4))

    def __post_init__(self) -> None:
        self._given = given_thresholds(self.thresholds)

    def add(self, batch: ScoreBatch, keep: Bools | None = None) -> None:
        """Add one batch; its verdicts do not matter here."""
        weights, empty = _weights(batch), batch.empty()
        self.num_empty += int(np.count_nonzero(empty))
        with np.errstate(invalid="ignore"):
            self.empty = self.empty + weights[:, empty].sum(axis=1)
        for name in _STATISTICS:
            values = batch.filled(name)
            known = ~np.isnan(values)
            if known.any():
                if name not in self.counts:
                    self.counts[name] = self._uncounted(name)
                inside = slice(None) if known.all() else known
                self.counts[name].add(values[inside], weights[:, inside])

    def __add__(self, other: DeltaTotals) -> DeltaTotals:
        if self.thresholds != other.thresholds:
            raise UsageError(
                "Two summaries with different thresholds cannot be added", next_step="Build both with the same."
            )
        with np.errstate(invalid="ignore"):
            empty = self.empty + other.empty
        counts = merged(self.counts, other.counts)
        return DeltaTotals(self.thresholds, counts, self.num_empty + other.num_empty, empty)

    def curves(self) -> AcceptanceCurves:
        """Acceptance of every statistic at `DELTAS`."""
        curves = {}
        for name, counts in self._ordered():
            n = counts.count + self.num_empty
            curves[name] = Curve(n, (counts.at_most(DELTAS) / n).tolist())
        return AcceptanceCurves(DELTAS.tolist() if curves else [], curves)

    def tables(self) -> dict[str, DeltaTable]:
        """A table for each of the main statistics, and for those that a criterion is on, that the data have."""
        return {name: self._table(name, counts) for name, counts in self._ordered() if self._is_main(name)}

    def targets(self, wanted: float) -> list[Target]:
        """For each statistic with a table the smallest of `FINE_DELTAS` that keeps at least `wanted` of all sequences.

        Args:
            wanted: share, above 0 and at most 1.

        Raises:
            UsageError: it is not.
        """
        if not 0 < wanted <= 1:
            raise UsageError(
                f"{wanted} is no share of the sequences",
                place="--target-acceptance",
                next_step="Give a number above 0 and at most 1, as 0.9.",
            )
        return [
            _target(name, counts, counts.count + self.num_empty, wanted)
            for name, counts in self._ordered()
            if self._is_main(name)
        ]

    def _uncounted(self, name: str) -> WeightedCounts:
        own = [self._given[name]] if name in self._given else []
        fine = FINE_DELTAS if self._is_main(name) else DELTAS
        return WeightedCounts(np.union1d(DELTAS, own), np.union1d(fine, own))

    def _ordered(self) -> Iterator[tuple[str, WeightedCounts]]:
        return ((name, self.counts[name]) for name in _STATISTICS if name in self.counts)

    def _is_main(self, name: str) -> bool:
        return name in _TABLED or name in self._given

    def _table(self, name: str, counts: WeightedCounts) -> DeltaTable:
        marked = MARKED.get(name, [])
        own = [self._given[name]] if name in self._given else []
        deltas = sorted({*_shown(counts.at_most(ROUND_DELTAS)), *marked, *own})
        kept, n = counts.at_most(np.array(deltas)), counts.count + self.num_empty
        with np.errstate(invalid="ignore"):
            weights = np.cumsum(counts.weights, axis=0)
        totals, weights = weights[-1], weights[np.searchsorted(counts.grid, deltas)]
        correct = totals[_CORRECT] + self.empty[_CORRECT] if totals[_REWARDED] + self.empty[_REWARDED] else None
        rows = [
            _row(delta, int(num), n, weight, float(totals[_TOKENS]), correct)
            for delta, num, weight in zip(deltas, kept, weights, strict=True)
        ]
        return DeltaTable(n, int(totals[_TOKENS]), marked, rows)


def given_thresholds(thresholds: Thresholds) -> dict[str, float]:
    """Statistic -> the criterion's threshold on it.

    Where kl or tv itself is not known, what it would keep lies between what its two bounds keep; kl may be estimated.
    """
    out: dict[str, float] = {}
    for kind, delta, named in (
        ("max", thresholds.delta_max, thresholds.max_of),
        ("mean", thresholds.delta_avg, thresholds.avg_of),
        ("sum", thresholds.delta_total, thresholds.total_of),
    ):
        for divergence in (named,) if named else ("kl", SAMPLED_DEFAULTS[kind]):
            compared = {"kl": _KL, "tv": _TV}.get(divergence, (divergence,))
            if delta is not None:
                out |= {f"seq_{kind}_{each}": delta for each in compared}
    return out


def _weights(batch: ScoreBatch) -> Floats:
    """[4, rows] policy tokens, has a reward, has one above 0, reward; 0 where there is none."""
    reward = batch.filled("reward")
    known = ~np.isnan(reward)
    tokens = np.where(np.isnan(batch.filled("num_tokens")), 0.0, batch.filled("num_tokens"))
    return np.stack([tokens, known, reward > 0, np.where(known, reward, 0.0)])


def _shown(kept: Ints) -> list[float]:
    """The round thresholds from the last that keeps nothing to the first that keeps as many as the largest.

    Of more than `MOST_ROWS` those are left out, one after another, between whose neighbours acceptance moves least.
    """
    first = max(int(np.searchsorted(kept, 1)) - 1, 0)
    last = max(int(np.searchsorted(kept, kept[-1])), first)
    shown = list(range(first, last + 1))
    while len(shown) > MOST_ROWS:
        steps = kept[shown[2:]] - kept[shown[:-2]]
        del shown[1 + int(np.argmin(steps))]
    return [float(delta) for delta in ROUND_DELTAS[shown]]


def _row(delta: float, num: int, n: int, weight: Floats, num_tokens: float, correct: float | None) -> DeltaRow:
    """`weight` [4] is of the kept sequences, `correct` of all; None without rewards."""
    return DeltaRow(
        delta=delta,
        num_kept=num,
        share_kept=num / n,
        share_tokens_kept=float(weight[_TOKENS]) / num_tokens if num_tokens else math.nan,
        num_kept_correct=None if correct is None else int(weight[_CORRECT]),
        num_rejected_correct=None if correct is None else int(correct - weight[_CORRECT]),
        mean_reward_kept=float(weight[_REWARD] / weight[_REWARDED]) if weight[_REWARDED] else None,
    )


def _target(name: str, counts: WeightedCounts, n: int, wanted: float) -> Target:
    needed = math.ceil(wanted * n)  # the product may be off by a rounding, so the share itself decides
    needed += (needed / n < wanted) - ((needed - 1) / n >= wanted)
    kept = np.cumsum(counts.cells)[:-1]
    at = int(np.searchsorted(kept, needed))
    if at == len(kept):
        return Target(name, wanted, None, None)
    return Target(name, wanted, float(counts.fine[at]), int(kept[at]) / n)
