"""The worst sequences, to be looked at: which they are, and an excerpt around the worst token of each.

One pass remembers at most fifteen rows, whole; the excerpts are cut from them at the end.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.blocks import ShownToken, WorstSequence
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import TokenText
from trm_audit.report.summary import Thresholds
from trm_audit.rollout import SAMPLED_DIVERGENCES

NUM_BY_MAX = 6
NUM_BY_MEAN = 3
MAX_RESPONSE = 120
"""Tokens of an excerpt of the response."""
MAX_PROMPT = 60
"""Tokens shown of the prompt, its last ones."""

MEAN_DIVERGENCES = ("kl", "kl_estimate", "kl_upper", "k3")
"""Of each row the first that it has."""

_SHOWN = ("group_id", "engine", "staleness", "reward", "num_tokens", "prompt_ids", "response_ids")
_TOKENS = ("response_mask", "rollout_logprobs", "trainer_logprobs", "log_ratio")


@dataclass(frozen=True, eq=False)
class _Row:
    """A row that may be among the worst: the shard's own columns, as far as they are shown (copied, one row)."""

    rollout_id: str
    group_id: Hashable
    columns: pa.RecordBatch
    keep: bool | None

    @property
    def group(self) -> Hashable:
        """The row itself where it has none."""
        return self if self.group_id is None else self.group_id


@dataclass(frozen=True)
class _Candidate:
    """A row with its value of one statistic."""

    value: float
    divergence: str
    row: _Row

    @property
    def rank(self) -> tuple[float, str]:
        """Largest value first, equal ones by `rollout_id`."""
        return -self.value, self.row.rollout_id


@dataclass
class _Largest:
    """The rows with the largest values of one statistic of the first divergence that each has, one of each group.

    Rollouts of a prompt often share the context of their maximum: six of them would be one finding, six times.

    Attributes:
        statistic: `max` or `mean`.
        divergences: in order of preference.
        size: how many are kept.
        found: at most `size`, largest first.
    """

    statistic: str
    divergences: tuple[str, ...]
    size: int
    found: list[_Candidate]

    def select(self, batch: ScoreBatch, ids: pa.Array) -> list[tuple[int, str, float]]:
        """Rows of a batch that are among its largest and not below all that were found: row, divergence, value."""
        values, which = np.full(batch.num_rows, np.nan), np.zeros(batch.num_rows, dtype=np.int64)
        for at, name in enumerate(self.divergences):
            fresh = batch.filled(f"seq_{self.statistic}_{name}")
            take = np.isnan(values) & ~np.isnan(fresh)
            values[take], which[take] = fresh[take], at
        lowest = self.found[-1].value if len(self.found) == self.size else -math.inf
        rows = np.flatnonzero(values >= lowest)
        rows = rows[_order(values[rows], ids, rows)]
        rows = rows[_first_of_each(batch.codes("group_id")[1][rows])][: self.size]
        return [(row, self.divergences[which[row]], float(values[row])) for row in rows.tolist()]

    def keep(self, candidates: Sequence[_Candidate]) -> None:
        """Let candidates take the places of smaller ones, and of smaller ones of their group."""
        best: dict[Hashable, _Candidate] = {}
        for candidate in sorted([*self.found, *candidates], key=lambda candidate: candidate.rank):
            best.setdefault(candidate.row.group, candidate)
        self.found = list(best.values())[: self.size]


class WorstTotals:
    """The sequences with the largest maximum of the divergence that decides, and with the largest mean.

    Args:
        thresholds: `max_of` is what the maximum is of; None takes of each row the first of kl, kl_estimate,
            kl_lower and k2.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        by_mean = NUM_BY_MAX + NUM_BY_MEAN  # the largest maxima may be the largest means, too
        self._largest = (
            _Largest("max", _deciding(thresholds.max_of), NUM_BY_MAX, []),
            _Largest("mean", MEAN_DIVERGENCES, by_mean, []),
        )

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; `keep` [rows] or None where nothing was decided."""
        ids = batch.batch.column("rollout_id") if batch.has("rollout_id") else pa.nulls(batch.num_rows)
        ids = ids.cast(pa.string()).fill_null("")
        names, codes = batch.codes("group_id")
        rows: dict[int, _Row] = {}
        for largest in self._largest:
            selected = largest.select(batch, ids)
            for at, _, _ in selected:
                if at not in rows:
                    kept = None if keep is None else bool(keep[at])
                    group = names[codes[at]] if codes[at] >= 0 else None
                    rows[at] = _Row(ids[at].as_py(), group, self._columns(batch, at), kept)
            largest.keep([_Candidate(value, divergence, rows[at]) for at, divergence, value in selected])

    def _columns(self, batch: ScoreBatch, row: int) -> pa.RecordBatch:
        divergences = dict.fromkeys(name for largest in self._largest for name in largest.divergences)
        wanted = (*_SHOWN, *_TOKENS, *divergences, *(f"seq_argmax_{name}" for name in divergences))
        return batch.batch.select([name for name in wanted if batch.has(name)]).take(pa.array([row]))

    def __add__(self, other: WorstTotals) -> WorstTotals:
        merged = WorstTotals(self.thresholds)
        for into, *parts in zip(merged._largest, self._largest, other._largest, strict=True):
            for part in parts:
                into.keep(part.found)
        return merged

    def finish(self, tokenizer: TokenText | None) -> list[WorstSequence]:
        """At most 6 sequences with the largest maximum, then at most 3 with the largest mean, each of another group.

        Args:
            tokenizer: for the text of the tokens; None shows ids.

        A row without `response_ids` has an empty excerpt. `position` is None where neither `seq_argmax_*` nor per-token
        values tell it.
        """
        by_max, by_mean = (largest.found for largest in self._largest)
        seen = {candidate.row.group for candidate in by_max}
        others = [candidate for candidate in by_mean if candidate.row.group not in seen][:NUM_BY_MEAN]
        shown = [_shown(candidate, "max", tokenizer) for candidate in by_max]
        return shown + [_shown(candidate, "mean", tokenizer) for candidate in others]


def _deciding(max_of: str | None) -> tuple[str, ...]:
    """The divergences that a threshold on the maximum may be compared with, the best first."""
    if max_of is None:
        return "kl", "kl_estimate", "kl_lower", "k2"
    return {"kl": ("kl", "kl_estimate", "kl_lower"), "tv": ("tv", "tv_lower")}.get(max_of, (max_of,))


def _order(values: Floats, ids: pa.Array, rows: Ints) -> Ints:
    """Indices that sort values descending, equal ones by id."""
    table = pa.table({"value": values, "id": ids.take(pa.array(rows))})
    order: Ints = pc.sort_indices(table, sort_keys=[("value", "descending"), ("id", "ascending")]).to_numpy()
    return order.astype(np.int64)


def _first_of_each(codes: Ints) -> Ints:
    """Places of the first row of each group, and of all rows without one (-1), in their order."""
    distinct = np.where(codes < 0, np.arange(-len(codes), 0), codes)
    return np.sort(np.unique(distinct, return_index=True)[1])


def _shown(candidate: _Candidate, statistic: str, tokenizer: TokenText | None) -> WorstSequence:
    columns, name = candidate.row.columns.to_pylist()[0], candidate.divergence
    response, prompt = columns.get("response_ids") or [], columns.get("prompt_ids") or []
    values = _values(columns, name)
    position = _position(columns, name, values)
    start = max(0, min((position or 0) - MAX_RESPONSE // 2, len(response) - MAX_RESPONSE))
    staleness = _known(columns.get("staleness"))
    return WorstSequence(
        rollout_id=candidate.row.rollout_id,
        group_id=_words(columns.get("group_id")),
        engine=_words(columns.get("engine")),
        staleness=None if staleness is None else int(staleness),
        reward=_known(columns.get("reward")),
        keep=candidate.row.keep,
        statistic=f"seq_{statistic}_{name}",
        divergence=name,
        value=candidate.value,
        position=position,
        num_tokens=int(_known(columns.get("num_tokens")) or 0),
        response_length=len(response) or len(values),
        prompt_length=len(prompt),
        prompt=[_token(token, tokenizer) for token in prompt[-MAX_PROMPT:]],
        start=start,
        response=[
            _token(
                token,
                tokenizer,
                _at(values, at),
                _at(columns.get("rollout_logprobs"), at),
                _at(columns.get("trainer_logprobs"), at),
            )
            for at, token in enumerate(response[start : start + MAX_RESPONSE], start)
        ],
    )


def _values(columns: dict[str, Any], name: str) -> list[float | None]:
    """[response tokens] the divergence, None where there is none; empty where the row has no such list."""
    if name in SAMPLED_DIVERGENCES and name != "log_ratio":
        log_ratio = columns.get("log_ratio") or []
        found = sampled_divergences(np.array(log_ratio, dtype=np.float64))[name].tolist()
    else:
        found = columns.get(name) or []
    mask = (columns.get("response_mask") if found else None) or [True] * len(found)
    return [_known(value) if inside else None for value, inside in zip(found, mask, strict=True)]


def _position(columns: dict[str, Any], name: str, values: list[float | None]) -> int | None:
    """Index of the first largest value in the response, None where it is not known."""
    stored = columns.get(f"seq_argmax_{name}")
    if stored is not None:
        return int(stored)
    known = [(-value, at) for at, value in enumerate(values) if value is not None]
    return min(known)[1] if known else None


def _at(values: list[float | None] | None, index: int) -> float | None:
    return _known(values[index]) if values and index < len(values) else None


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _words(value: object) -> str | None:
    return None if value is None else str(value)


def _token(
    token: int,
    tokenizer: TokenText | None,
    value: float | None = None,
    rollout_logprob: float | None = None,
    trainer_logprob: float | None = None,
) -> ShownToken:
    text = None if tokenizer is None or token < 0 else tokenizer.text(token)
    return ShownToken(token, text, value, rollout_logprob, trainer_logprob)
