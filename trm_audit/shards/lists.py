"""Arrow list columns as flat arrays with offsets, and top-K lists as the columns of a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged

IDS_TYPE = pa.list_(pa.list_(pa.int32()))

Lists = tuple[NDArray[Any], NDArray[Any], Ints]
"""Ids and log-probabilities of a row's lists one after another, and the length of each, [response tokens]."""


def ragged(array: pa.Array) -> Ragged:
    """A list column as values and offsets; null rows are empty. Slices and values under nulls are taken care of."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets)


def per_token(column: pa.Array | None, response: Ragged, fill: float) -> Floats:
    """A per-token column over all response tokens, `fill` where the column or its row is null."""
    out = np.full(len(response.values), fill, dtype=np.float64)
    if column is not None:
        there = np.repeat(np.asarray(column.is_valid()), response.lengths)
        values = column.flatten()
        if pa.types.is_boolean(values.type):
            values = pc.cast(values, pa.int8())
        out[there] = values.to_numpy(zero_copy_only=False)  # nulls inside become NaN
    return out


def made_lists(kept: Mapping[str, NDArray[Any]], mask: Bools) -> Lists:
    """Lists of a row's policy tokens, and empty ones elsewhere.

    Args:
        kept: topk_ids and topk_logprobs [policy tokens, K] among others, descending; -inf stands for none.
        mask: [response tokens] True for the policy's.
    """
    there = kept["topk_logprobs"] > -np.inf
    lengths = np.zeros(len(mask), dtype=np.int64)
    lengths[mask] = there.sum(1)
    return kept["topk_ids"][there], kept["topk_logprobs"][there], lengths


def list_arrays(rows: Sequence[Lists | None], kind: pa.DataType) -> tuple[pa.Array, pa.Array]:
    """The two columns of top-K lists, null for a row without: list<list<int32>>, and `kind`, a list of lists."""
    there = [row for row in rows if row is not None]
    none = pa.array([row is None for row in rows], pa.bool_())
    tokens = np.cumsum([0, *(0 if row is None else len(row[2]) for row in rows)])
    entries = np.cumsum(np.concatenate([[0], *(row[2] for row in there)]))
    parts = [np.concatenate([np.zeros(0), *(row[i] for row in there)]) for i in (0, 1)]
    wanted = (IDS_TYPE, kind)
    values = (pa.array(part).cast(of.value_type.value_type, safe=False) for part, of in zip(parts, wanted, strict=True))
    ids, logprobs = (
        pa.ListArray.from_arrays(
            pa.array(tokens, pa.int32()), pa.ListArray.from_arrays(pa.array(entries, pa.int32()), flat), mask=none
        ).cast(of)
        for flat, of in zip(values, wanted, strict=True)
    )
    return ids, logprobs
