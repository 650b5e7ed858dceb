"""What the one pass remembers: sums by key, by prompt and by position, and what the bounds need.

Every class has `+`: two halves of the data, added in any order, are the whole. Memory grows with the number of
prompts (and distinct rewards in each), of categories, and with the longest response, never with the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trm_audit.numerics.histogram import Moments
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.columns import TV_FROM_RATIO, ScoreBatch


class KeyedTotals:
    """A fixed number of totals for each key, in arrays that grow: sums, or with another ufunc maxima.

    Worked instance: width 2; add(["p1", "p2"], [[1, 5], [1, 7]]) twice: keys p1, p2, values [[2, 10], [2, 14]].
    """

    def __init__(self, width: int, combine: np.ufunc = np.add, start: float = 0.0) -> None:
        self.index: dict[Hashable, int] = {}
        self._combine, self._start = combine, start
        self._values = np.full((64, width), start)

    @property
    def values(self) -> Floats:
        """[keys, width] in the order of first appearance."""
        return self._values[: len(self.index)]

    def add(self, keys: Sequence[Hashable], values: Floats) -> None:
        """Combine `values` [len(keys), width] with what the keys have."""
        rows = np.fromiter((self.index.setdefault(key, len(self.index)) for key in keys), np.int64, len(keys))
        if len(self.index) > len(self._values):
            grown = np.full((2 * len(self.index), self._values.shape[1]), self._start)
            grown[: len(self._values)] = self._values
            self._values = grown
        self._combine.at(self._values, rows, values)

    def __add__(self, other: KeyedTotals) -> KeyedTotals:
        merged = KeyedTotals(self._values.shape[1], self._combine, self._start)
        merged.add(list(self.index), self.values)
        merged.add(list(other.index), other.values)
        return merged


def sum_by_code(codes: Ints, values: Floats, size: int) -> Floats:
    """[size, width] sums of `values` [n, width] by code in [0, size); codes below 0 are left out."""
    inside = codes >= 0
    columns = [np.bincount(codes[inside], weights=column[inside], minlength=size) for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((size, 0))


@dataclass(frozen=True)
class Evidence:
    """From which columns one grade's bounds are computed, and what may be said of them.

    Attributes:
        told_by: statistics that tell rows of this evidence where no grade is given.
        kl_max: D whose `seq_max_D` stands for delta.
        kl_seq: D whose `seq_sum_D` stands for D_seq.
        tv_max: D whose `seq_max_D` stands for eps, or None: then Pinsker alone.
        tv_token: per-token quantity whose mean by position stands for Dbar_t.
        label: one sentence for the reader; `{confidence}` stands for that of the bounds.
        suffix: of the names of its bounds, so that exact and estimated never share one.
    """

    told_by: tuple[str, str]
    kl_max: str
    kl_seq: str
    tv_max: str | None
    tv_token: str
    label: str
    suffix: str


EVIDENCE = {
    "exact": Evidence(
        ("seq_max_kl", "seq_sum_kl"),
        "kl",
        "kl",
        "tv",
        "tv",
        "from exact divergences at the contexts that were sampled",
        "",
    ),
    "sketch": Evidence(
        ("seq_max_kl_estimate", "seq_sum_kl_estimate"),
        "kl_upper",
        "kl_upper",
        "tv_upper",
        "tv_upper",
        "from upper bounds of sketches at the contexts that were sampled: delta and eps, the largest, hold each "
        "{confidence}; D_seq and Dbar_t are means of such bounds",
        "_upper",
    ),
    "interval": Evidence(
        ("seq_max_kl_upper", "seq_sum_kl_upper"),
        "kl_upper",
        "kl_upper",
        "tv_upper",
        "tv_upper",
        "from rigorous upper bounds at the contexts that were sampled",
        "_upper",
    ),
    "sampled": Evidence(
        ("seq_max_k2", "seq_sum_k3"),
        "k2",
        "k3",
        None,
        TV_FROM_RATIO,
        "an estimate from sampled tokens: max k2 for delta, mean seq_sum_k3 for D_seq, mean |ratio - 1|/2 for Dbar_t",
        "_estimate",
    ),
}


@dataclass
class PositionTotals:
    """One per-token quantity by policy token position.

    Attributes:
        sums: [longest] total over rows, 0 after a response's end.
        rows: rows it covers, those without policy tokens included.
    """

    sums: Floats = field(default_factory=lambda: np.zeros(0))
    rows: int = 0

    def add(self, batch: ScoreBatch, name: str, members: Bools) -> None:
        """Add the rows of a batch where `members` holds and that have the list."""
        tokens = batch.tokens(name)
        if tokens is None:
            return
        values, positions = tokens.values, tokens.positions
        if not members.all():
            inside = members[tokens.rows]
            values, positions = values[inside], positions[inside]
        self.sums = add_padded(self.sums, np.bincount(positions, weights=values).astype(np.float64))
        self.rows += int(np.count_nonzero(members & (tokens.present | batch.empty())))

    def __add__(self, other: PositionTotals) -> PositionTotals:
        return PositionTotals(add_padded(self.sums, other.sums), self.rows + other.rows)

    def __len__(self) -> int:
        return len(self.sums)

    def means(self, rows: int) -> Floats | None:
        """[longest] mean over `rows` sequences; None where some of them had no per-token values."""
        return self.sums / rows if rows and self.rows == rows else None


@dataclass
class DivergenceTotals:
    """What the bounds need of one kind of evidence, over all rows or the kept ones.

    Attributes:
        rows: sequences with this evidence, those without policy tokens included (their sums are 0).
        kl_max, tv_max: largest `seq_max_*`, -inf before any.
        kl_seq: total of `seq_sum_*`.
        by_position, kl_by_position: the tv quantity and the D of `kl_seq` at each policy token position.
    """

    rows: int = 0
    kl_max: float = -math.inf
    tv_max: float = -math.inf
    kl_seq: float = 0.0
    by_position: PositionTotals = field(default_factory=PositionTotals)
    kl_by_position: PositionTotals = field(default_factory=PositionTotals)

    def add(self, batch: ScoreBatch, evidence: Evidence, members: Bools) -> None:
        """Add the rows of a batch where `members` holds."""
        self.rows += int(np.count_nonzero(members))
        self.kl_max = max(self.kl_max, _largest(batch.filled(f"seq_max_{evidence.kl_max}")[members]))
        if evidence.tv_max is not None:
            self.tv_max = max(self.tv_max, _largest(batch.filled(f"seq_max_{evidence.tv_max}")[members]))
        self.kl_seq += float(np.nansum(batch.filled(f"seq_sum_{evidence.kl_seq}")[members]))
        self.by_position.add(batch, evidence.tv_token, members)
        self.kl_by_position.add(batch, evidence.kl_seq, members)

    def __add__(self, other: DivergenceTotals) -> DivergenceTotals:
        return DivergenceTotals(
            self.rows + other.rows,
            max(self.kl_max, other.kl_max),
            max(self.tv_max, other.tv_max),
            self.kl_seq + other.kl_seq,
            self.by_position + other.by_position,
            self.kl_by_position + other.kl_by_position,
        )

    def tv_by_position(self) -> Floats | None:
        """[longest] Dbar_t: mean over all rows, 0 after a response's end; None where rows had no per-token values."""
        return self.by_position.means(self.rows)


def evidence_rows(batch: ScoreBatch, name: str) -> Bools:
    """[rows] rows that carry one kind of evidence, those without policy tokens included.

    `sampled` statistics exist at every grade, so they take all rows; the others take those of their grade and, where no
    grade is given, those that have the statistics. Bounds tell `interval` only where there is no estimate beside them.
    """
    found = _told(batch, name)
    if name == "interval":
        found &= ~_told(batch, "sketch")
    if any(map(batch.has, EVIDENCE[name].told_by)):
        found |= batch.empty()
    grades, codes = batch.codes("grade")
    if name == "sampled":
        return found
    out: Bools = np.where(codes >= 0, codes == (grades.index(name) if name in grades else -2), found)
    return out


def _told(batch: ScoreBatch, name: str) -> Bools:
    """[rows] rows with one of the statistics that tell a kind of evidence."""
    first, second = (~np.isnan(batch.filled(column)) for column in EVIDENCE[name].told_by)
    found: Bools = first | second
    return found


@dataclass
class ClusterTotals:
    """Sums by prompt and moments of the rows without a group: what a cluster-robust interval needs.

    Attributes:
        groups: group_id -> (rows with a value, their sum) for each name, one after another.
        singles: name -> moments over rows whose `group_id` is null or absent.
    """

    names: tuple[str, ...]
    groups: KeyedTotals = field(init=False)
    singles: dict[str, Moments] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = KeyedTotals(2 * len(self.names))
        self.singles = {name: Moments() for name in self.names}

    def add(self, batch: ScoreBatch, values: dict[str, Floats]) -> None:
        """Add name -> [rows], NaN where a row has no value."""
        keys, codes = batch.codes("group_id")
        alone = codes < 0
        columns = []
        for name in self.names:
            known = ~np.isnan(values[name])
            columns += [known.astype(np.float64), np.where(known, values[name], 0.0)]
            self.singles[name].add(values[name][known & alone])
        self.groups.add(keys, sum_by_code(codes, np.stack(columns, axis=1), len(keys)))

    def __add__(self, other: ClusterTotals) -> ClusterTotals:
        merged = ClusterTotals(self.names)
        merged.groups = self.groups + other.groups
        merged.singles = {name: self.singles[name] + other.singles[name] for name in self.names}
        return merged

    def of(self, name: str) -> tuple[Floats, Floats, Moments]:
        """Sizes and sums of the clusters in which `name` occurs, and the moments of the rows that stand alone."""
        at = 2 * self.names.index(name)
        sizes, sums = self.groups.values[:, at], self.groups.values[:, at + 1]
        return sizes[sizes > 0], sums[sizes > 0], self.singles[name]


def merged(a: dict[Any, Any], b: dict[Any, Any]) -> dict[Any, Any]:
    """Values of equal keys are added."""
    return {key: a[key] + b[key] if key in a and key in b else a.get(key, b.get(key)) for key in (*a, *b)}


def add_padded(a: Floats, b: Floats) -> Floats:
    """Elementwise sum of two lists, the shorter filled up with 0."""
    out = np.zeros(max(len(a), len(b)))
    out[: len(a)] += a
    out[: len(b)] += b
    return out


def _largest(values: Floats) -> float:
    """Largest number, -inf of none; NaN is passed over."""
    return float(np.fmax.reduce(values, initial=-np.inf))
