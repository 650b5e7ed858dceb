"""One batch of a score or training shard as numpy arrays, whatever columns it has.

Per-sequence columns become float64 with NaN for null. Per-token lists lose the positions where `response_mask` is
false and the rows whose list is null, and remember which row and which policy token each value belongs to.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.errors import BadInput
from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.rollout import SAMPLED_DIVERGENCES

TV_FROM_RATIO = "half_abs_ratio_minus_1"
"""|ratio - 1| / 2: its expectation under the rollout policy is the total variation; a single value is not."""


@dataclass(frozen=True)
class TokenColumn:
    """One per-token quantity of a batch, policy tokens only.

    Attributes:
        values: [n] float64.
        rows: [n] row of the batch.
        positions: [n] number of policy tokens before it in its row.
        present: [rows of the batch] True where the row has a list.

    Worked instance: lists [[.1, null, .3], null], response_mask [[1, 0, 1], [1]]: values [.1, .3], rows [0, 0],
    positions [0, 1], present [True, False].
    """

    values: Floats
    rows: Ints
    positions: Ints
    present: Bools


class ScoreBatch:
    """The columns of one batch, read on first use and kept."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.num_rows: int = batch.num_rows
        self._names = set(batch.schema.names)
        self._floats: dict[str, Floats | None] = {}
        self._tokens: dict[str, TokenColumn | None] = {}

    def has(self, name: str) -> bool:
        """Whether the batch has the column."""
        return name in self._names

    def floats(self, name: str) -> Floats | None:
        """[rows] a scalar column, NaN for null; None without the column."""
        if name not in self._floats:
            self._floats[name] = _to_floats(self.batch.column(name)) if self.has(name) else None
        return self._floats[name]

    def filled(self, name: str) -> Floats:
        """[rows] a scalar column, NaN for null and where there is no such column."""
        column = self.floats(name)
        return np.full(self.num_rows, np.nan) if column is None else column

    def codes(self, name: str) -> tuple[list[Hashable], Ints]:
        """The distinct values that occur and, per row, which of them it has (-1 for null and without the column)."""
        if not self.has(name):
            return [], np.full(self.num_rows, -1, dtype=np.int64)
        column = self.batch.column(name)
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        used, codes = np.unique(indices, return_inverse=True)
        absent = int(np.count_nonzero(used < 0))  # null sorts first
        return encoded.dictionary.take(pa.array(used[absent:])).to_pylist(), codes - absent

    def empty(self) -> Bools:
        """[rows] rows known to have no policy token."""
        out: Bools = self.filled("num_tokens") == 0
        return out

    def tokens(self, name: str) -> TokenColumn | None:
        """A per-token quantity: a list column, or what follows from `log_ratio`; None without such a list."""
        if name not in self._tokens:
            derived = name == TV_FROM_RATIO or (name in SAMPLED_DIVERGENCES and name != "log_ratio")
            self._tokens[name] = self._derived(name) if derived else self._listed(name)
        return self._tokens[name]

    def _derived(self, name: str) -> TokenColumn | None:
        source = self.tokens("log_ratio")
        if source is None:
            return None
        for key, values in sampled_divergences(source.values).items():
            self._tokens[key] = TokenColumn(values, source.rows, source.positions, source.present)
        half = np.abs(np.expm1(np.minimum(source.values, 700.0))) / 2
        self._tokens[TV_FROM_RATIO] = TokenColumn(half, source.rows, source.positions, source.present)
        return self._tokens[name]

    def _listed(self, name: str) -> TokenColumn | None:
        if not self.has(name) or not _is_list(self.batch.column(name).type):
            return None
        column = self.batch.column(name)
        present = column.is_valid().to_numpy(zero_copy_only=False)
        lengths = _lengths(column)
        rows = np.repeat(np.arange(self.num_rows), lengths)
        values = _to_floats(column.flatten())
        mask = self._response_mask(name, lengths, rows, present) & ~np.isnan(values)
        before: Ints = np.cumsum(mask) - mask
        starts = np.cumsum(lengths) - lengths
        positions = before - np.append(before, 0)[starts][rows]
        return TokenColumn(values[mask], rows[mask], positions[mask], present)

    def _response_mask(self, name: str, lengths: Ints, rows: Ints, present: Bools) -> Bools:
        """[n] True where the policy sampled the token; all true without the column."""
        if not self.has("response_mask"):
            return np.ones(len(rows), dtype=bool)
        column = self.batch.column("response_mask")
        given = column.is_valid().to_numpy(zero_copy_only=False)
        mask_lengths = _lengths(column)
        wrong = np.flatnonzero(present & given & (mask_lengths != lengths))
        if len(wrong):
            raise _length_error(name, int(wrong[0]), int(lengths[wrong[0]]), int(mask_lengths[wrong[0]]))
        mask = column.flatten().fill_null(False).to_numpy(zero_copy_only=False)
        inside = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]
        known = given[rows]
        out = np.ones(len(rows), dtype=bool)
        out[known] = mask[((np.cumsum(mask_lengths) - mask_lengths)[rows] + inside)[known]]
        return out


def oldest_policy_version(batch: ScoreBatch) -> Floats | None:
    """[rows] `policy_version`, of a list the smallest over policy tokens; NaN for null, None without the column."""
    if not batch.has("policy_version"):
        return None
    column = batch.batch.column("policy_version")
    if not _is_list(column.type):
        return batch.floats("policy_version")
    out = np.full(batch.num_rows, np.inf)
    values = _to_floats(column.flatten())
    if batch.has("response_mask"):
        masks = batch.batch.column("response_mask")
        known = np.repeat(np.asarray(masks.is_valid()), _lengths(column))
        inside = np.ones(len(values), dtype=bool)
        inside[known] = _to_floats(masks.filter(column.is_valid()).flatten()) == 1
        values = np.where(inside, values, np.nan)
    np.fmin.at(out, np.repeat(np.arange(batch.num_rows), _lengths(column)), values)
    out[np.isinf(out)] = np.nan
    return out


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _lengths(column: pa.Array) -> Ints:
    lengths: Ints = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _to_floats(column: pa.Array) -> Floats:
    """float64 with NaN for null; of any numeric, bool or null type."""
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def _length_error(name: str, row: int, entries: int, mask_entries: int) -> BadInput:
    return BadInput(
        f"{name} has {entries} tokens, response_mask has {mask_entries}",
        place=f"row {row} of the batch",
        next_step="Per-token columns of a row must have equal length (schemas/rollout.md, rule 4).",
    )
