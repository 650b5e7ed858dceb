"""Which tokens carry the divergence: by position, probability, entropy, length, token id, group and expert routing.

Every axis has fixed bins, so that totals of two halves of the data add up to those of the whole. Position,
probability and entropy share one table of cells (position, probability, entropy): a token is looked up once and the
three tables of the report are its margins.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.blocks import BinDivergence, Routing, TokenBin, TokenRow
from trm_audit.report.breakdown import MAIN_DIVERGENCES, CategoryTotals
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import TokenText

Axis = Literal["position", "rollout_probability", "entropy", "length"]

_POWERS = [float(2**power) for power in range(32)]
_PROBABILITIES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99]
_ENTROPIES = [0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0]
EDGES: dict[Axis, list[float]] = {
    "position": [0.0, *_POWERS],
    "rollout_probability": [0.0, *_PROBABILITIES],
    "entropy": [0.0, *_ENTROPIES],
    "length": [0.0, *_POWERS],
}
"""Lower edge of each bin; the last one is open. Entropy in nats, position and length in policy tokens."""

RANKED_BY = ("kl", "kl_estimate", "k3", "kl_upper")
"""What token ids (by sum) and groups (by mean) are ranked by: the first that any of them has."""
NUM_TOKEN_IDS = 20
NUM_GROUPS = 20
LARGEST_ID = 2**20
"""Token ids from here on, and negative ones, are no vocabulary's: they count in the totals and are not listed."""

_TOKEN_AXES: tuple[Axis, ...] = ("position", "rollout_probability", "entropy")
_SHAPE = tuple(len(EDGES[axis]) + (axis != "position") for axis in _TOKEN_AXES)  # one more: tokens without the quantity
_LOG_PROBABILITIES = [math.log(edge) for edge in _PROBABILITIES]


@dataclass
class _Sums:
    """One divergence by bin: tokens that have it, their sum, the largest (-inf where there is none)."""

    tokens: Floats
    total: Floats
    largest: Floats

    @classmethod
    def empty(cls, size: int) -> _Sums:
        return cls(np.zeros(size), np.zeros(size), np.full(size, -np.inf))

    def add(self, codes: Ints, totals: Floats, largest: Floats) -> None:
        """Add all but the number of tokens; entry i belongs to bin codes[i]."""
        _add_at(self.total, codes, totals)
        higher = np.flatnonzero(largest > self.largest[codes])  # few once the first batch is in
        np.maximum.at(self.largest, codes[higher], largest[higher])

    def include(self, other: _Sums) -> None:
        size = len(other.total)
        self.tokens[:size] += other.tokens
        with np.errstate(over="ignore"):
            self.total[:size] += other.total
        np.maximum(self.largest[:size], other.largest, out=self.largest[:size])


@dataclass
class DivergenceBins:
    """The main divergences by bin.

    Attributes:
        n: [bins] what was counted: tokens, or sequences.
        sums: divergence -> totals, for those that occur.
    """

    n: Ints
    sums: dict[str, _Sums] = field(default_factory=dict)

    @classmethod
    def empty(cls, size: int) -> DivergenceBins:
        """No tokens in `size` bins."""
        return cls(np.zeros(size, dtype=np.int64))

    def add_tokens(self, batch: ScoreBatch, codes: Ints) -> None:
        """Add every policy token of a batch; `codes` [policy tokens] is its bin."""
        _add_at(self.n, codes, None)
        many = len(codes) >= len(self.n)
        counts = np.bincount(codes, minlength=len(self.n)) if many else None  # most divergences share them
        for name in MAIN_DIVERGENCES:
            values, column = batch.aligned(name), batch.tokens(name)
            if values is None or column is None or not len(column.values):
                continue
            sums, complete = self.of(name), len(column.values) == len(codes)
            known = codes if complete else codes[~np.isnan(values)]
            sums.add(known, column.values, column.values)
            if complete and counts is not None:
                sums.tokens += counts
            else:
                _add_at(sums.tokens, known, None)

    def of(self, name: str) -> _Sums:
        """The totals of one divergence."""
        return self.sums.setdefault(name, _Sums.empty(len(self.n)))

    def grow(self, size: int) -> None:
        """Room for at least `size` bins."""
        if size > len(self.n):
            grown = DivergenceBins.empty(max(size, len(self.n) * 5 // 4)) + self
            self.n, self.sums = grown.n, grown.sums

    def __add__(self, other: DivergenceBins) -> DivergenceBins:
        merged = DivergenceBins.empty(max(len(self.n), len(other.n)))
        for part in (self, other):
            merged.n[: len(part.n)] += part.n
            for name, sums in part.sums.items():
                merged.of(name).include(sums)
        return merged

    def margin(self, shape: tuple[int, ...], axis: int) -> DivergenceBins:
        """Bins along one axis of cells that lie as an array of `shape`."""
        others = tuple(at for at in range(len(shape)) if at != axis)
        out = DivergenceBins(self.n.reshape(shape).sum(axis=others))
        for name, sums in self.sums.items():
            out.sums[name] = _Sums(
                sums.tokens.reshape(shape).sum(axis=others),
                sums.total.reshape(shape).sum(axis=others),
                sums.largest.reshape(shape).max(axis=others),
            )
        return out

    def divergences(self, which: int) -> dict[str, BinDivergence]:
        """The figures of one bin, for the divergences that its tokens have.

        `share` is of the sum over all bins, those of tokens without the quantity included; NaN where that sum is 0
        or inf.
        """
        out = {}
        for name in MAIN_DIVERGENCES:
            sums = self.sums.get(name)
            if sums is not None and sums.tokens[which]:
                with np.errstate(over="ignore"):
                    whole = float(sums.total.sum())
                part = float(sums.total[which])
                share = part / whole if 0 < whole < math.inf else math.nan
                out[name] = BinDivergence(part / float(sums.tokens[which]), float(sums.largest[which]), share)
        return out

    def table(self, edges: list[float]) -> list[TokenBin]:
        """A row for each bin that is not empty; bins from `len(edges)` on have no row."""
        ends = [*edges[1:], None]
        return [
            TokenBin(edges[at], ends[at], int(self.n[at]), self.divergences(at))
            for at in range(len(edges))
            if self.n[at]
        ]


@dataclass
class TokenBinTotals:
    """Tokens by position, rollout probability and entropy, and by the length of their sequence.

    The probability is exp(`rollout_logprobs`). The entropy is `rollout_entropy`, and `trainer_entropy` at the tokens
    that have no other. A length counts sequences; its divergences come from `seq_sum_*` and `seq_max_*`.
    """

    cells: DivergenceBins = field(default_factory=lambda: DivergenceBins.empty(math.prod(_SHAPE)))
    lengths: DivergenceBins = field(default_factory=lambda: DivergenceBins.empty(len(EDGES["length"]) + 1))

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; verdicts do not matter."""
        positions = np.minimum(np.frexp(batch.policy_tokens.positions.astype(np.float64))[1], _SHAPE[0] - 1)
        codes = positions.astype(np.int64)
        for size, known, edges in (
            (_SHAPE[1], batch.aligned("rollout_logprobs"), _LOG_PROBABILITIES),
            (_SHAPE[2], _entropy(batch), _ENTROPIES),
        ):
            codes *= size
            codes += size - 1 if known is None else _bin(known, edges)
        self.cells.add_tokens(batch, codes)
        self._add_lengths(batch)

    def _add_lengths(self, batch: ScoreBatch) -> None:
        tokens = batch.filled("num_tokens")
        unknown = len(EDGES["length"])
        codes = np.where(tokens > 0, np.minimum(np.frexp(np.nan_to_num(tokens))[1], unknown - 1), unknown)
        _add_at(self.lengths.n, codes, None)
        for name in MAIN_DIVERGENCES:
            totals, largest = batch.filled(f"seq_sum_{name}"), batch.filled(f"seq_max_{name}")
            known = ~(np.isnan(tokens) | np.isnan(totals) | np.isnan(largest))
            if known.any():
                sums = self.lengths.of(name)
                sums.add(codes[known], totals[known], largest[known])
                _add_at(sums.tokens, codes[known], tokens[known])

    def __add__(self, other: TokenBinTotals) -> TokenBinTotals:
        return TokenBinTotals(self.cells + other.cells, self.lengths + other.lengths)

    def finish(self, axis: Axis) -> list[TokenBin]:
        """The bins of one axis, ascending.

        Bins without a token are left out (`low` and `high` show the gap), and so are tokens without the quantity;
        they count in what shares are shares of. Empty where no token has it.
        """
        bins = self.lengths if axis == "length" else self.cells.margin(_SHAPE, _TOKEN_AXES.index(axis))
        return bins.table(EDGES[axis])


@dataclass
class TokenIdTotals:
    """Tokens by id; bin 0 holds those without a plausible one, bin i + 1 token id i."""

    bins: DivergenceBins = field(default_factory=lambda: DivergenceBins.empty(1024))

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; verdicts do not matter."""
        ids = batch.token_ids()
        if ids is None or not len(ids):
            return
        codes = np.where((ids >= 0) & (ids < LARGEST_ID), ids + 1, 0)
        self.bins.grow(int(codes.max()) + 1)
        self.bins.add_tokens(batch, codes)

    def __add__(self, other: TokenIdTotals) -> TokenIdTotals:
        return TokenIdTotals(self.bins + other.bins)

    def finish(self, tokenizer: TokenText | None) -> list[TokenRow]:
        """The ids with the largest sum of the first of `RANKED_BY` that occurs, at most 20; ties by id."""
        name = next((name for name in RANKED_BY if name in self.bins.sums), None)
        if name is None:
            return []
        total = self.bins.sums[name].total[1:]
        first = np.lexsort((np.arange(len(total)), -total))[:NUM_TOKEN_IDS]
        return [
            TokenRow(
                number,
                None if tokenizer is None else tokenizer.text(number),
                int(self.bins.n[number + 1]),
                self.bins.divergences(number + 1),
            )
            for number in first.tolist()
            if total[number] > 0
        ]


@dataclass
class GroupTotals:
    """Groups (rollouts of one prompt); memory grows with their number."""

    totals: CategoryTotals = field(default_factory=CategoryTotals)

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; rows without `group_id` belong to no group."""
        self.totals.add(batch, *batch.codes("group_id"), keep)

    def __add__(self, other: GroupTotals) -> GroupTotals:
        return GroupTotals(self.totals + other.totals)

    def rows(self) -> list[tuple[Hashable, Floats, Floats]]:
        """As `CategoryTotals.rows`: the 20 groups with the largest mean per token, largest first, ties by name.

        The mean is that of the first of `RANKED_BY` that any group has; groups without it are left out.
        """
        for name in RANKED_BY:
            at = 3 + 2 * MAIN_DIVERGENCES.index(name)
            known = [row for row in self.totals.rows() if row[1][at]]
            if known:
                known.sort(key=lambda row: -float(row[1][at + 1]) / float(row[1][at]))
                return known[:NUM_GROUPS]
        return []


@dataclass
class RoutingTotals:
    """Tokens by whether the trainer chose all of the experts that were stored, from `routing_agreement`.

    Attributes:
        bins: the same experts, others, not known.
        agreement: sum of the shares of stored experts that the trainer chose too.
    """

    bins: DivergenceBins = field(default_factory=lambda: DivergenceBins.empty(3))
    agreement: float = 0.0

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; verdicts do not matter."""
        agreement = batch.aligned("routing_agreement")
        if agreement is None:
            return
        known = ~np.isnan(agreement)
        self.agreement += float(agreement[known].sum())
        self.bins.add_tokens(batch, np.where(known, np.where(agreement < 1, 1, 0), 2))

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(self.bins + other.bins, self.agreement + other.agreement)

    def finish(self) -> Routing | None:
        """None where no token has the column."""
        same, differing = int(self.bins.n[0]), int(self.bins.n[1])
        if not same + differing:
            return None
        mean = self.agreement / (same + differing)
        return Routing(same + differing, mean, differing, self.bins.divergences(0), self.bins.divergences(1))


def _add_at(into: NDArray[Any], codes: Ints, weights: Floats | None) -> None:
    """into[codes[i]] += weights[i] (1 for None), in the way that is faster for so many entries and bins."""
    with np.errstate(over="ignore"):
        if len(codes) < len(into):
            np.add.at(into, codes, 1 if weights is None else weights)
        else:
            into += np.bincount(codes, weights=weights, minlength=len(into))


def _bin(values: Floats, edges: list[float]) -> Ints:
    """[n] how many of the edges each value reaches; `len(edges) + 1` for NaN."""
    out = np.zeros(len(values), dtype=np.int8)
    for edge in edges:  # about ten comparisons of whole arrays: twice as fast as a search for each value
        out += values >= edge
    out[np.isnan(values)] = len(edges) + 1
    return out.astype(np.int64)


def _entropy(batch: ScoreBatch) -> Floats | None:
    rollout, trainer = batch.aligned("rollout_entropy"), batch.aligned("trainer_entropy")
    if rollout is None or trainer is None:
        return trainer if rollout is None else rollout
    return np.where(np.isnan(rollout), trainer, rollout)
