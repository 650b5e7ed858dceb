"""From a batch of a score shard and its verdicts to the columns of a training shard (schemas/training.md)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.rollout import TOKEN_SCORES
from trm_audit.shards.scores import carried

FIRST = (
    "rollout_id",
    "group_id",
    "prompt_ids",
    "response_ids",
    "response_mask",
    "loss_mask",
    "keep",
    "reason",
    "rollout_logprobs",
    "trainer_logprobs",
    "log_ratio",
    "reward",
    "advantage",
    "policy_version",
)
"""Columns of a training shard in this order; what else the score shard holds follows."""
WRITTEN = {"loss_mask", "keep", "reason"}
LEFT_BEHIND = frozenset(TOKEN_SCORES) - {"trainer_logprobs", "log_ratio"}
"""Per-token scores that no trainer reads; the score shard keeps them."""
LOGPROBS = ("rollout_logprobs", "trainer_logprobs", "log_ratio")


def training_columns(
    batch: pa.RecordBatch, keep: Bools, reason: list[str | None], advantage: Floats | None
) -> pa.RecordBatch:
    """One batch of a training shard.

    Args:
        batch: of a score shard; statistics alone are enough, masks are left out where there are no responses.
        keep: [rows] verdicts.
        reason: [rows] None where kept.
        advantage: [rows] to fill in, NaN for null; None leaves the column as it is.
    """
    columns = {name: column for name, column in carried(batch, WRITTEN).items() if name not in LEFT_BEHIND}
    if "response_ids" in columns:
        mask = _response_mask(columns)
        flat = mask.flatten().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(mask).to_numpy(zero_copy_only=False)
        columns["response_mask"] = mask
        columns["loss_mask"] = _like(mask, pa.array(flat & np.repeat(keep, lengths)))
        for name in LOGPROBS:
            if name in columns:
                columns[name] = _zero_outside(columns[name], flat, lengths)
    columns["keep"] = pa.array(keep)
    columns["reason"] = pa.array(reason, pa.string())
    if advantage is not None:
        columns["advantage"] = pa.array(advantage, mask=np.isnan(advantage))
    order = [name for name in FIRST if name in columns] + [name for name in columns if name not in FIRST]
    return pa.RecordBatch.from_pydict({name: columns[name] for name in order})


def _response_mask(columns: dict[str, pa.Array]) -> pa.ListArray:
    """The mask as stored; all True where it is null or absent."""
    responses = columns["response_ids"]
    lengths = pc.list_value_length(responses).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    out = np.ones(int(offsets[-1]), dtype=np.bool_)
    stored = columns.get("response_mask")
    if stored is not None:
        out[np.repeat(np.asarray(stored.is_valid()), lengths)] = stored.flatten().to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(out))


def _like(column: pa.ListArray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(column.offsets, values)


def _zero_outside(column: pa.Array, mask: Bools, lengths: Floats) -> pa.Array:
    """0.0 at positions outside the mask, so that a product with a mask stays finite; null lists stay null."""
    valid = np.asarray(column.is_valid())
    inside = mask[np.repeat(valid, lengths.astype(np.int64))]
    values = pc.if_else(pa.array(inside), column.flatten(), pa.scalar(0.0, column.type.value_type))
    offsets = np.concatenate([[0], np.cumsum(np.where(valid, lengths, 0))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(~valid))
