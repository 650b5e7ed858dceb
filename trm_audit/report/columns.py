"""One batch of a score or training shard as numpy arrays, whatever columns it has.

Per-sequence columns become float64 with NaN for null. Per-token lists lose the positions where `response_mask` is
false and the rows whose list is null, and remember which row and which policy token each value belongs to.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.errors import BadInput
from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.rollout import SAMPLED_DIVERGENCES, TOKEN_SCORES

TV_FROM_RATIO = "half_abs_ratio_minus_1"
"""|ratio - 1| / 2: its expectation under the rollout policy is the total variation; a single value is not."""

_LISTS = ("response_mask", "response_ids", "rollout_logprobs")


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


@dataclass(frozen=True)
class PolicyTokens:
    """The policy tokens of a batch, flat, row after row: what `aligned` and `token_ids` are parallel to.

    Attributes:
        rows: [n] row of the batch.
        positions: [n] number of policy tokens before it in its row.
        indices: [n] its index in `response_ids`.

    Worked instance: response_mask [[1, 0, 1], [1]]: rows [0, 0, 1], positions [0, 1, 0], indices [0, 2, 0].
    """

    rows: Ints
    positions: Ints
    indices: Ints


class ScoreBatch:
    """The columns of one batch, read on first use and kept."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.num_rows: int = batch.num_rows
        self._names = set(batch.schema.names)
        self._codes: dict[str, tuple[list[Hashable], Ints]] = {}
        self._floats: dict[str, Floats | None] = {}
        self._aligned: dict[str, Floats | None] = {}
        self._tokens: dict[str, TokenColumn | None] = {}

    def has(self, name: str) -> bool:
        """Whether the batch has the column."""
        return name in self._names

    def floats(self, name: str) -> Floats | None:
        """[rows] a scalar column, NaN for null; None without the column."""
        if name not in self._floats:
            self._floats[name] = _to_floats(self.batch.column(name), name) if self.has(name) else None
        return self._floats[name]

    def filled(self, name: str) -> Floats:
        """[rows] a scalar column, NaN for null and where there is no such column."""
        column = self.floats(name)
        return np.full(self.num_rows, np.nan) if column is None else column

    def codes(self, name: str) -> tuple[list[Hashable], Ints]:
        """The distinct values that occur and, per row, which of them it has (-1 for null and without the column)."""
        if name not in self._codes:
            self._codes[name] = self._encode(name)
        return self._codes[name]

    def _encode(self, name: str) -> tuple[list[Hashable], Ints]:
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

    @cached_property
    def lengths(self) -> Ints:
        """[rows] entries of the row's per-token lists; 0 where it has none."""
        out = np.full(self.num_rows, -1, dtype=np.int64)
        for name in (*_LISTS, *TOKEN_SCORES):
            column = self._list_column(name)
            if column is not None and (out < 0).any():
                out = np.where(out >= 0, out, _lengths(column))
        return np.maximum(out, 0)

    @cached_property
    def _sampled(self) -> Bools:
        """[entries] True where the policy sampled the token; all true for rows without `response_mask`."""
        column = self._list_column("response_mask")
        if column is None:
            return np.ones(int(self.lengths.sum()), dtype=bool)
        sampled: Bools = self._spread("response_mask", column, 1.0) == 1
        return sampled

    @cached_property
    def policy_tokens(self) -> PolicyTokens:
        """Where the policy tokens of the batch are."""
        starts = np.cumsum(self.lengths) - self.lengths
        rows = np.repeat(np.arange(self.num_rows), self.lengths)
        before: Ints = np.cumsum(self._sampled) - self._sampled
        positions = before - np.append(before, 0)[starts][rows]
        indices = np.arange(len(rows)) - starts[rows]
        inside = self._sampled
        return PolicyTokens(rows[inside], positions[inside], indices[inside])

    def aligned(self, name: str) -> Floats | None:
        """[policy tokens] a per-token quantity, NaN where a row or a token has none; None without such a list.

        A list column, or what follows from `log_ratio`.
        """
        if name not in self._aligned:
            derived = name == TV_FROM_RATIO or (name in SAMPLED_DIVERGENCES and name != "log_ratio")
            column = None if derived else self._list_column(name)
            if derived:
                self._derive(name)
            else:
                self._aligned[name] = None if column is None else self._spread(name, column, np.nan)[self._sampled]
        return self._aligned[name]

    def token_ids(self) -> Ints | None:
        """[policy tokens] `response_ids`; None without the column."""
        column = self._list_column("response_ids")
        return None if column is None else self._spread("response_ids", column, -1.0)[self._sampled].astype(np.int64)

    def tokens(self, name: str) -> TokenColumn | None:
        """The known values of a per-token quantity; None without such a list."""
        if name not in self._tokens:
            values = self.aligned(name)
            self._tokens[name] = None if values is None else self._known(name, values)
        return self._tokens[name]

    def _known(self, name: str, values: Floats) -> TokenColumn:
        source = self._list_column(name if self.has(name) else "log_ratio")
        present = np.zeros(self.num_rows, dtype=bool) if source is None else np.asarray(source.is_valid())
        known = ~np.isnan(values)
        where = self.policy_tokens
        if known.all():
            return TokenColumn(values, where.rows, where.positions, present)
        return TokenColumn(values[known], where.rows[known], where.positions[known], present)

    def _derive(self, name: str) -> None:
        source = self.aligned("log_ratio")
        if source is None:
            self._aligned[name] = None
            return
        self._aligned.update(sampled_divergences(source))
        self._aligned[TV_FROM_RATIO] = np.abs(np.expm1(np.minimum(source, 700.0))) / 2

    def _list_column(self, name: str) -> pa.Array | None:
        return self.batch.column(name) if self.has(name) and _is_list(self.batch.column(name).type) else None

    def _spread(self, name: str, column: pa.Array, missing: float) -> Floats:
        """[entries] the values of a list column; `missing` for rows whose list is null, NaN for null entries.

        Raises:
            BadInput: a row's list is not as long as its others.
        """
        entries = _lengths(column)
        wrong = np.flatnonzero((entries >= 0) & (entries != self.lengths))
        if len(wrong):
            raise _length_error(name, int(wrong[0]), int(entries[wrong[0]]), int(self.lengths[wrong[0]]))
        values = _to_floats(column.flatten(), name)
        if not column.null_count:
            return values
        out = np.full(int(self.lengths.sum()), missing)
        out[np.repeat(entries >= 0, self.lengths)] = values
        return out


def oldest_policy_version(batch: ScoreBatch) -> Floats | None:
    """[rows] `policy_version`, of a list the smallest over policy tokens; NaN for null, None without the column."""
    if not batch.has("policy_version"):
        return None
    column = batch.batch.column("policy_version")
    if not _is_list(column.type):
        return batch.floats("policy_version")
    out = np.full(batch.num_rows, np.inf)
    lengths = np.maximum(_lengths(column), 0)
    values = _to_floats(column.flatten(), "policy_version")
    if batch.has("response_mask"):
        masks = batch.batch.column("response_mask")
        known = np.repeat(np.asarray(masks.is_valid()), lengths)
        inside = np.ones(len(values), dtype=bool)
        inside[known] = _to_floats(masks.filter(column.is_valid()).flatten(), "response_mask") == 1
        values = np.where(inside, values, np.nan)
    np.fmin.at(out, np.repeat(np.arange(batch.num_rows), lengths), values)
    out[np.isinf(out)] = np.nan
    return out


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _lengths(column: pa.Array) -> Ints:
    """[rows] entries of each list, -1 for null."""
    lengths: Ints = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _to_floats(column: pa.Array, name: str) -> Floats:
    """float64 with NaN for null; of any numeric, bool or null type.

    Raises:
        BadInput: what the column `name` holds is no number.
    """
    try:
        values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise BadInput(
            f"column {name!r} is {column.type}, numbers are needed",
            place="score shards",
            next_step="Convert it, or leave it out (schemas/score.md).",
        ) from error
    return values


def _length_error(name: str, row: int, entries: int, others: int) -> BadInput:
    return BadInput(
        f"{name} has {entries} tokens, other per-token columns have {others}",
        place=f"row {row} of the batch",
        next_step="Per-token columns of a row must have equal length (schemas/rollout.md, rule 4).",
    )
