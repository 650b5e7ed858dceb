"""Impulses (isolated tokens far above their neighbours) against drift (all tokens shifted a little).

The two have different causes. Old weights shift every context and show in the median; a routing decision or a rounding
that flips moves single tokens and leaves the median where it was. Impulses alone do not prove a flip: weights that
drift change a few decisive tokens most. What separates them is staleness 0, where the weights are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from trm_audit.numerics.histogram import LogHistogram
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.blocks import Impulses, ImpulseShare
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.shown import number, percent

REACH = 3
"""Neighbours on each side: policy tokens of the same sequence that have the divergence."""
MIN_NEIGHBOURS = 2
MAX_STALENESS = 32
"""Values of staleness that are told apart; the largest ones beyond that many count in the whole only."""
MIN_TOKENS = 100
"""Of fewer, nothing is said in words."""

SMALL = 1e-4
"""A shift of all tokens below it (a tenth of the mean that the paper allows) is not worth a search for its cause."""

_OFFSETS = np.array([offset for offset in range(-REACH, REACH + 1) if offset])
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Detector:
    """When a token is an impulse: above `floor` (nats) and `factor` times the median of its neighbours."""

    divergence: str
    floor: float
    factor: float

    @property
    def definition(self) -> str:
        """In words."""
        return (
            f"{self.divergence} above {self.floor:g} and above {self.factor:g} times the median of its neighbours, the "
            f"{REACH} policy tokens on each side"
        )

    def find(self, values: Floats, rows: Ints) -> Bools:
        """[n] which of the values are impulses.

        Args:
            values: [n] one divergence, row after row, NaN nowhere; inf is larger than anything but inf.
            rows: [n] row of each value, ascending.
        """
        out = np.zeros(len(values), dtype=bool)
        above = np.flatnonzero(values > self.floor)
        for start in range(0, len(above), _CHUNK):  # bounds the memory of the [candidates, 6] arrays
            at = above[start : start + _CHUNK]
            with np.errstate(over="ignore"):
                out[at] = values[at] > self.factor * _median_of_neighbours(values, rows, at)
        return out


DETECTORS = (
    *(Detector(name, 0.01, 10.0) for name in ("kl", "kl_estimate", "kl_lower")),
    Detector("k3", 0.01, 100.0),
)
"""The first that the data have is used.

kl, its estimate and its lower bound speak of the whole distribution. k3 speaks of one token drawn from it: under a
small uniform shift it is kl times a chi-square variable of one degree of freedom, of which 7.8 % exceed ten times the
median of six others by the draw alone and 0.2 % a hundred times. Hence the larger factor.
"""


@dataclass
class _Part:
    """The tokens of one staleness."""

    values: LogHistogram = field(default_factory=LogHistogram)
    num_impulses: int = 0
    impulses: float = 0.0
    elsewhere: float = 0.0

    def add(self, values: Floats, found: Bools) -> None:
        self.values.add(values)
        self.num_impulses += int(np.count_nonzero(found))
        with np.errstate(over="ignore"):
            self.impulses = float(np.add(self.impulses, values[found].sum()))
            self.elsewhere = float(np.add(self.elsewhere, values[~found].sum()))

    def __add__(self, other: _Part) -> _Part:
        return _Part(
            self.values + other.values,
            self.num_impulses + other.num_impulses,
            self.impulses + other.impulses,
            self.elsewhere + other.elsewhere,
        )

    def share(self, value: int | None) -> ImpulseShare:
        """As the report shows it; the share is NaN where the sum is 0 or inf."""
        n, total = self.values.count, self.impulses + self.elsewhere
        return ImpulseShare(
            value=value,
            num_tokens=n,
            num_impulses=self.num_impulses,
            share_of_sum=self.impulses / total if 0 < total < math.inf else math.nan,
            median=self.values.quantile(0.5),
            mean_elsewhere=self.elsewhere / (n - self.num_impulses) if n > self.num_impulses else math.nan,
        )


@dataclass
class _Parts:
    """One divergence by staleness: the `MAX_STALENESS` smallest values, and the rest.

    The smallest of all data are among the smallest of each part of it, so what is kept does not depend on the order.
    """

    by_staleness: dict[int, _Part] = field(default_factory=dict)
    rest: _Part = field(default_factory=_Part)

    def add(self, values: Floats, staleness: Floats, found: Bools) -> None:
        """Add tokens; `staleness` [n] is that of each, NaN where unknown."""
        seen = np.unique(staleness[~np.isnan(staleness)])
        left = np.ones(len(values), dtype=bool)
        for value in seen[:MAX_STALENESS].tolist():
            own = staleness == value
            self.by_staleness.setdefault(int(value), _Part()).add(values[own], found[own])
            left &= ~own
        self._shrink()
        if left.any():
            self.rest.add(values[left], found[left])

    def _shrink(self) -> None:
        for value in sorted(self.by_staleness)[MAX_STALENESS:]:
            self.rest += self.by_staleness.pop(value)

    def __add__(self, other: _Parts) -> _Parts:
        merged = _Parts(rest=self.rest + other.rest)
        for value in {*self.by_staleness, *other.by_staleness}:
            both = [parts.by_staleness.get(value, _Part()) for parts in (self, other)]
            merged.by_staleness[value] = both[0] + both[1]
        merged._shrink()
        return merged


@dataclass
class ImpulseTotals:
    """Impulses of each divergence that may turn out to be the best that the data have."""

    parts: dict[str, _Parts] = field(default_factory=dict)

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; verdicts do not matter."""
        for detector in DETECTORS:
            column = batch.tokens(detector.divergence)
            if column is not None and len(column.values):
                found = detector.find(column.values, column.rows)
                staleness = batch.filled("staleness")[column.rows]
                self.parts.setdefault(detector.divergence, _Parts()).add(column.values, staleness, found)
                return  # those that follow cannot be the first that the data have

    def __add__(self, other: ImpulseTotals) -> ImpulseTotals:
        names = {**self.parts, **other.parts}
        return ImpulseTotals({name: self.parts.get(name, _Parts()) + other.parts.get(name, _Parts()) for name in names})

    def finish(self) -> Impulses | None:
        """Impulses of the first of `DETECTORS` whose divergence occurs; None where none does."""
        for detector in DETECTORS:
            parts = self.parts.get(detector.divergence)
            if parts is not None:
                whole = sum(parts.by_staleness.values(), parts.rest).share(None)
                by_staleness = [parts.by_staleness[value].share(value) for value in sorted(parts.by_staleness)]
                sentence = describe(detector.divergence, whole, by_staleness)
                return Impulses(detector.divergence, detector.definition, whole, by_staleness, sentence)
        return None


def describe(divergence: str, whole: ImpulseShare, by_staleness: list[ImpulseShare]) -> str:
    """Which of the two it is, as far as the figures tell: the freshest tokens, then what staleness changes."""
    compared = [share for share in by_staleness if share.num_tokens >= MIN_TOKENS]
    first = compared[0] if compared else whole
    if first.num_tokens < MIN_TOKENS:
        return f"Too few tokens to tell impulses from a shift of all: {first.num_tokens} of {MIN_TOKENS}."
    said = [_kind(divergence, first), _cause(first)]
    if len(compared) > 1:
        said += _trend(compared[0], compared[-1])
    return " ".join(sentence for sentence in said if sentence)


def _kind(divergence: str, share: ImpulseShare) -> str:
    """Where the divergence of some tokens is: in a few of them, or in all."""
    where = "" if share.value is None else f"At staleness {share.value} "
    tokens = f"of {share.num_tokens:,} tokens"
    level = f"the median token is at {number(share.median)}"
    if not share.num_impulses:
        said = f"{where}none {tokens} is an impulse; {level}{', all are shifted a little' * _shifted(share)}."
    elif math.isnan(share.share_of_sum):
        said = f"{where}{share.num_impulses:,} {tokens} are impulses, of an infinite sum of {divergence}; {level}."
    else:
        carried = f"impulses carry {percent(share.share_of_sum)} of the summed {divergence}"
        said = f"{where}{carried} on {percent(share.num_impulses / share.num_tokens)} {tokens}, and {level}: "
        if share.share_of_sum >= 0.5:
            said += "single tokens, not a shift of all."
        else:
            said += "nearly all are shifted a little." if _shifted(share) else "most of it is in tokens like others."
    return said[0].upper() + said[1:]


def _shifted(share: ImpulseShare) -> bool:
    """Whether the median says as much as the mean without the impulses: a shift of all tokens, not a tail."""
    return SMALL <= share.mean_elsewhere < 10 * share.median < math.inf


def _cause(share: ImpulseShare) -> str:
    """What may be behind it; the next step where the data cannot say."""
    same = "The weights are the same there: look" if share.value == 0 else "Look"
    if share.num_impulses and not share.share_of_sum < 0.5:
        if share.value == 0:
            return f"{same} at routing (mixture of experts), kernels and precision."
        return (
            "Flips of routing or kernels make impulses, and so does drift of the weights at decisive tokens: rollouts "
            "at staleness 0 tell the two apart."
        )
    if _shifted(share):
        old = "" if share.value == 0 else ", old weights"
        return f"{same} at what moves every token: quantisation, precision, sampling settings{old}."
    return ""


def _trend(first: ImpulseShare, last: ImpulseShare) -> list[str]:
    """What changes from the freshest tokens to the stalest."""
    if not last.median >= 2 * first.median or last.median == 0:
        return [
            f"The median does not rise with staleness ({number(last.median)} at {last.value}): no drift of the weights "
            "is seen in it."
        ]
    said = [
        f"The median rises with staleness, from {number(first.median)} at {first.value} to {number(last.median)} at "
        f"{last.value}: drift of the weights."
    ]
    before, after = (share.num_impulses / share.num_tokens for share in (first, last))
    if after >= 2 * before and last.num_impulses:
        said.append(f"Impulses rise with it, from {percent(before)} to {percent(after)} of the tokens.")
    return said


def _median_of_neighbours(values: Floats, rows: Ints, at: Ints) -> Floats:
    """[m] median of the up to six neighbours of each value that `at` [m] points to; inf where there are too few."""
    near = at[:, None] + _OFFSETS
    inside = (near >= 0) & (near < len(values))
    near = np.where(inside, near, 0)
    inside &= rows[near] == rows[at][:, None]
    ordered = np.sort(np.where(inside, values[near], np.nan), axis=1)  # NaN last
    count = inside.sum(axis=1)
    each, some = np.arange(len(at)), np.maximum(count, 1)
    with np.errstate(over="ignore"):
        median = (ordered[each, (some - 1) // 2] + ordered[each, some // 2]) / 2
    return np.where(count >= MIN_NEIGHBOURS, median, np.inf)
