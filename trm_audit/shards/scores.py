"""From token scores to the columns of a score shard (schemas/score.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.numerics.ragged import Bools, Floats, Ints, SequenceStatistics, segment_sum, sequence_statistics
from trm_audit.rollout import DIVERGENCES, TOKEN_SCORES, RolloutBatch, TokenScores
from trm_audit.shards.schema import BULKY

SEQUENCE_COLUMNS = ("grade", "audited_policy", "num_tokens", "staleness", "num_disagreements", "num_infinite")
STATISTICS = ("max", "mean", "sum", "argmax")


def score_columns(
    batch: RolloutBatch, scores: TokenScores, trainer_version: int | None, *, rebuilds: bool
) -> pa.RecordBatch:
    """One batch of a score shard: the rollout's columns without bulky evidence, then scores.

    Args:
        batch: the rollouts.
        scores: of their tokens.
        trainer_version: for `staleness`; None leaves it null.
        rebuilds: the shard may have rows whose `rollout_logprobs` are rebuilt, so it gets the `_stored` column too.
    """
    written = {
        *TOKEN_SCORES,
        *SEQUENCE_COLUMNS,
        *_sequence_names(),
        "trainer_logprobs_stored",
        *["rollout_logprobs_stored"] * rebuilds,
    }
    columns = carried(batch.columns, written - {"trainer_logprobs"})
    stored = columns.pop("trainer_logprobs", None)
    if stored is not None and batch.stored_trainer_logprobs is None:
        columns["trainer_logprobs_stored"] = stored
    kept = columns.get("rollout_logprobs")
    if rebuilds and kept is not None:
        columns["rollout_logprobs_stored"] = pc.if_else(pa.array(scores.rebuilt), kept, None)
    if rebuilds or kept is None:
        columns["rollout_logprobs"] = token_column(scores.rollout_logprobs, batch.response.offsets)
    for name in TOKEN_SCORES:
        columns[name] = token_column(np.where(batch.response_mask, scores.tokens[name], np.nan), batch.response.offsets)
    columns.update(_sequence_columns(batch, scores, trainer_version))
    return pa.RecordBatch.from_pydict(columns)


def carried(batch: pa.RecordBatch, written: set[str]) -> dict[str, pa.Array]:
    """Columns that are carried on: no bulky evidence, and those that a stage writes itself under `<name>_stored`."""
    names = [name for name in batch.schema.names if name not in BULKY]
    out = {name: batch.column(name) for name in names if name not in written}
    for name in (name for name in names if name in written):
        free = f"{name}_stored"
        while free in names or free in written:
            free += "_stored"
        out[free] = batch.column(name)
    return out


def token_column(values: Floats, offsets: Ints) -> pa.Array:
    """list<float>, null entries where a value is NaN, a null list where all of a non-empty row are."""
    missing = np.isnan(values)
    lengths = np.diff(offsets)
    none = (segment_sum((~missing).astype(np.float64), offsets) == 0) & (lengths > 0)
    flat = pa.array(values.astype(np.float32), mask=missing)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, mask=pa.array(none))


def _sequence_names() -> list[str]:
    return [f"seq_{statistic}_{name}" for name in DIVERGENCES for statistic in STATISTICS]


def _sequence_columns(batch: RolloutBatch, scores: TokenScores, trainer_version: int | None) -> dict[str, pa.Array]:
    offsets, mask = batch.response.offsets, batch.response_mask
    num_tokens = segment_sum(mask.astype(np.float64), offsets).astype(np.int32)
    infinite = segment_sum((mask & np.isposinf(scores.tokens["kl"])).astype(np.float64), offsets)
    stale = np.full(len(batch), np.nan)
    if batch.policy_version is not None and trainer_version is not None:
        stale = trainer_version - batch.policy_version
    columns = {
        "grade": pa.array(list(batch.grade), pa.string()),
        "audited_policy": pa.array(scores.audited_policy, pa.string()),
        "num_tokens": pa.array(num_tokens),
        "staleness": pa.array(np.nan_to_num(stale).astype(np.int64), mask=np.isnan(stale)),
        "num_disagreements": pa.array(scores.num_disagreements.astype(np.int32)),
        "num_infinite": pa.array(infinite.astype(np.int32)),
    }
    with np.errstate(invalid="ignore"):
        values = {**sampled_divergences(scores.tokens["log_ratio"]), **scores.tokens}
    for name in DIVERGENCES:
        there = mask & ~np.isnan(values[name])
        columns.update(_statistic_columns(name, sequence_statistics(values[name], offsets, there)))
    return columns


def _statistic_columns(name: str, found: SequenceStatistics) -> dict[str, pa.Array]:
    def doubles(values: Floats) -> pa.Array:
        return pa.array(values, mask=np.isnan(values))

    none: Bools = found.argmax < 0
    return {
        f"seq_max_{name}": doubles(found.max),
        f"seq_mean_{name}": doubles(found.mean),
        f"seq_sum_{name}": doubles(found.sum),
        f"seq_argmax_{name}": pa.array(found.argmax.astype(np.int32), mask=none),
    }


class Counts:
    """What a shard's footer says it holds, summed over its batches."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._by: dict[str, Counter[str]] = {"grades": Counter(), "audited_policies": Counter()}

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts one batch of a score shard."""
        self._sums["rows"] += batch.num_rows
        for name in ("num_tokens", "num_disagreements", "num_infinite"):
            self._sums[name] += int(np.sum(batch.column(name).to_numpy(zero_copy_only=False)))
        scored = batch.filter(pc.greater(batch.column("num_tokens"), 0))
        for name, column in (("grades", "grade"), ("audited_policies", "audited_policy")):
            self._by[name].update(scored.column(column).to_pylist())

    def skip(self, rows: int) -> None:
        self._sums["num_skipped"] += rows

    def to_json(self) -> Mapping[str, object]:
        names = ("rows", "num_tokens", "num_disagreements", "num_infinite", "num_skipped")
        sums = {name: self._sums[name] for name in names}
        return {**sums, **{name: dict(sorted(by.items())) for name, by in self._by.items()}}
