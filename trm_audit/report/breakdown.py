"""The same few figures for each engine, policy version or staleness."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.columns import ScoreBatch, oldest_policy_version
from trm_audit.report.totals import KeyedTotals, sum_by_code

MAIN_DIVERGENCES = ("kl", "tv", "kl_estimate", "kl_lower", "kl_upper", "k2", "k3", "abs_log_ratio")


@dataclass
class CategoryTotals:
    """Rows, tokens, kept rows, and sums and maxima of the main divergences by category.

    Attributes:
        sums: category -> rows, num_tokens, kept rows, then tokens and sum for each main divergence.
        maxima: category -> largest `seq_max_D` for each main divergence, -inf where there is none.
    """

    sums: KeyedTotals = field(default_factory=lambda: KeyedTotals(3 + 2 * len(MAIN_DIVERGENCES)))
    maxima: KeyedTotals = field(default_factory=lambda: KeyedTotals(len(MAIN_DIVERGENCES), np.maximum, -np.inf))

    def add(self, batch: ScoreBatch, keys: list[Hashable], codes: Ints, keep: Bools | None) -> None:
        """Add one batch whose row i belongs to keys[codes[i]], or to none where the code is -1."""
        tokens = np.nan_to_num(batch.filled("num_tokens"))
        kept = np.zeros(batch.num_rows) if keep is None else keep.astype(np.float64)
        columns = [np.ones(batch.num_rows), tokens, kept]
        maxima = np.full((len(keys), len(MAIN_DIVERGENCES)), -np.inf)
        inside = codes >= 0
        for at, name in enumerate(MAIN_DIVERGENCES):
            total = batch.filled(f"seq_sum_{name}")
            known = ~np.isnan(total)
            columns += [np.where(known, tokens, 0.0), np.where(known, total, 0.0)]
            np.fmax.at(maxima[:, at], codes[inside], batch.filled(f"seq_max_{name}")[inside])
        self.sums.add(keys, sum_by_code(codes, np.stack(columns, axis=1), len(keys)))
        self.maxima.add(keys, maxima)

    def __add__(self, other: CategoryTotals) -> CategoryTotals:
        return CategoryTotals(self.sums + other.sums, self.maxima + other.maxima)

    def rows(self) -> list[tuple[Hashable, Floats, Floats]]:
        """Category, its sums and its maxima, in the order of the categories."""
        keys = sorted(self.sums.index, key=_order)
        sums, maxima = self.sums, self.maxima
        return [(key, sums.values[sums.index[key]], maxima.values[maxima.index[key]]) for key in keys]


def _order(key: Hashable) -> tuple[float, str]:
    """Numbers by size, then words by letter."""
    return (key, "") if isinstance(key, int) else (math.inf, str(key))


def categories(batch: ScoreBatch, column: str) -> tuple[list[Hashable], Ints] | None:
    """The categories of a batch and each row's (-1: none); None without the column.

    A list of policy versions counts as its oldest.
    """
    if not batch.has(column):
        return None
    if column == "engine":
        return batch.codes(column)
    numbers = oldest_policy_version(batch) if column == "policy_version" else batch.floats(column)
    if numbers is None:
        return None
    known = ~np.isnan(numbers)
    values, inverse = np.unique(numbers[known], return_inverse=True)
    codes = np.full(batch.num_rows, -1, dtype=np.int64)
    codes[known] = inverse
    return [int(value) for value in values], codes
