"""How far the bounds of KL and TV are apart, and how sure they are: by grade, as two grades share their columns.

At grade `interval` bounds are rigorous. At grade `sketch` they hold at the confidence that the rollouts were scored
with, over the draw of the random signs, which is one for all rows of a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trm_audit.numerics.histogram import LogHistogram
from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.distributions import quantiles
from trm_audit.report.summary import BoundWidths
from trm_audit.report.totals import evidence_rows, merged
from trm_audit.rollout import BOUNDED_GRADES

BOUNDED = ("kl", "tv")
"""What has a lower and an upper bound at these grades."""
SKETCH_SETTINGS = ("sketch_dim", "sketch_seed")


@dataclass
class WidthTotals:
    """Widths by grade and D of `BOUNDED`; two halves of the data, added in any order, are the whole.

    Attributes:
        tokens: (grade, `kl`) -> kl_upper - kl_lower of the policy tokens.
        sequences: (grade, `kl`) -> seq_max_kl_upper - seq_max_kl_lower, between which the sequence's largest kl is.
        settings: column of `SKETCH_SETTINGS` -> value -> sketched rows.
    """

    tokens: dict[tuple[str, str], LogHistogram] = field(default_factory=dict)
    sequences: dict[tuple[str, str], LogHistogram] = field(default_factory=dict)
    settings: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in SKETCH_SETTINGS})

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; verdicts do not matter."""
        members = {grade: evidence_rows(batch, grade) for grade in BOUNDED_GRADES}
        for name in BOUNDED:
            largest = _width(*(batch.floats(f"seq_max_{name}_{end}") for end in ("lower", "upper")))
            each = _width(*(batch.aligned(f"{name}_{end}") for end in ("lower", "upper")))
            for grade, own in members.items():
                _include(self.sequences, (grade, name), largest, own)
                _include(self.tokens, (grade, name), each, own[batch.policy_tokens.rows])
        for column, counter in self.settings.items():
            values, codes = batch.codes(column)
            numbers = np.bincount(codes[members["sketch"] & (codes >= 0)], minlength=len(values)).tolist()
            found = zip(values, numbers, strict=True)
            counter.update({value: n for value, n in found if isinstance(value, int) and n})

    def __add__(self, other: WidthTotals) -> WidthTotals:
        settings = {name: self.settings[name] + other.settings[name] for name in SKETCH_SETTINGS}
        return WidthTotals(merged(self.tokens, other.tokens), merged(self.sequences, other.sequences), settings)

    def finish(self, confidence: float | None) -> dict[str, BoundWidths]:
        """By grade, those that have rows with bounds.

        Args:
            confidence: of sketches' bounds, None where nothing tells it.
        """
        found = {grade for grade, _ in (*self.tokens, *self.sequences)}
        return {grade: self._of(grade, confidence) for grade in BOUNDED_GRADES if grade in found}

    def _of(self, grade: str, confidence: float | None) -> BoundWidths:
        tokens, sequences = (
            {f"{prefix}{name}_width": quantiles(each[grade, name]) for name in BOUNDED if (grade, name) in each}
            for prefix, each in (("", self.tokens), ("seq_max_", self.sequences))
        )
        if grade != "sketch":
            return BoundWidths(None, {}, {}, tokens, sequences)
        dims, seeds = ({str(value): n for value, n in sorted(each.items())} for each in self.settings.values())
        return BoundWidths(confidence, dims, seeds, tokens, sequences)


def smallest_confidence(runs: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the bounds that some runs made of sketches; None where none of them says it."""
    told = (run.get("confidence") for run in runs)
    return min((each for each in told if isinstance(each, float)), default=None)


def _width(lower: Floats | None, upper: Floats | None) -> Floats | None:
    """[n] upper - lower, 0 where both are infinite, NaN where one is not known; None without one of the columns."""
    if lower is None or upper is None:
        return None
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(lower) & (lower == upper), 0.0, upper - lower)


def _include(into: dict[tuple[str, str], LogHistogram], key: tuple[str, str], values: Floats | None, of: Bools) -> None:
    if values is not None and (known := of & ~np.isnan(values)).any():
        into.setdefault(key, LogHistogram()).add(values[known])
